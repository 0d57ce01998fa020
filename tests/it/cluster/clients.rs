//! A client whose edge is killed continues at another edge, in the same session. The SDK and `qpq`
//! show a short pause and no error.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use bytes::Bytes;
use qpq_client::{Client, Fingerprint, Options, SessionToken, Trust};
use qpq_proto::{
    methods::{Enqueue, Peek},
    v1,
};
use qpq_tests::{
    balancer::Balancer,
    cluster::{Cluster, Place, Plan},
    process::sibling,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

const PASSWORD: &str = "correct horse battery staple";
/// The time limit of a client's own recovery. A client leaves a silent edge after at most a minute.
const STUCK: Duration = Duration::from_secs(150);

struct World {
    cluster: Cluster,
    balancer: Balancer,
    edges: Vec<SocketAddr>,
}

impl World {
    /// Starts two edges. The balancer uses the first.
    async fn new() -> Self {
        let plan = Plan { edges: 2, place: Place::Apart, ..Plan::default() };
        let cluster = Cluster::start(plan).await.expect("a cluster");
        let edges = cluster.entry_points().addrs.to_vec();
        let balancer = Balancer::start(&edges[..1]).await.expect("a balancer");
        Self { cluster, balancer, edges }
    }

    /// Kills the first edge, and sends new connections to the other.
    async fn kill_first(&self) {
        self.balancer.aim(&self.edges[1..]);
        self.cluster.kill_edge(0).await.expect("killed");
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::from(self.cluster.entry_points().pin.0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_continues_at_another_edge_with_the_same_token() {
    let world = World::new().await;
    let account = world.cluster.accounts(1).await.unwrap().remove(0);
    let mut options =
        Options::new(world.balancer.addr().to_string(), Trust::Pinned(world.fingerprint()));
    // By default a call fails after half a minute.
    options.patience = STUCK;
    let client = Client::new(options).unwrap();
    client.set_session(Some(SessionToken::try_from(&account.token[..]).unwrap()));
    let send = |n: u8| v1::EnqueueRequest {
        recipient_key: account.identity.clone(),
        payload: Bytes::copy_from_slice(&[n]),
        message_id: Bytes::copy_from_slice(&[n; 16]),
        ..Default::default()
    };
    for n in 1..=3 {
        client.call::<Enqueue>(send(n)).await.unwrap();
    }
    world.kill_first().await;
    for n in 4..=6 {
        let receipt = timeout(STUCK, client.call::<Enqueue>(send(n)))
            .await
            .expect("an answer from the other edge")
            .unwrap();
        assert_eq!((receipt.seq, receipt.duplicate), (u64::from(n), false));
    }
    let page = client.call::<Peek>(v1::PeekRequest::default()).await.unwrap().payloads;
    let shown: Vec<u8> = page.iter().map(|envelope| envelope.data[0]).collect();
    assert_eq!(shown, [1, 2, 3, 4, 5, 6]);
}

/// An account with a home directory of its own.
struct Person<'a> {
    world: &'a World,
    name: &'static str,
}

impl Person<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let home = self.world.cluster.dir().join(self.name);
        let memory = home.join("memory");
        std::fs::create_dir_all(&memory).expect("a home");
        let mut command = Command::new(sibling("qpq").expect("the client's binary"));
        command
            .args(arguments)
            .env_clear()
            .env("QPQ_HOME", home.join("qpq"))
            .env("QPQ_SERVER", self.world.balancer.addr().to_string())
            .env("QPQ_PASSWORD", PASSWORD)
            .env("XDG_RUNTIME_DIR", memory)
            .current_dir(Path::new("/"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn ok(&self, arguments: &[&str]) {
        let output = timeout(STUCK, self.command(arguments).output())
            .await
            .expect("it ends")
            .expect("it can be started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{} {arguments:?}: {said}", self.name);
    }

    async fn registered(&self) {
        let pin = self.world.fingerprint().to_string();
        self.ok(&["register", self.name, "--pin", &pin]).await;
    }

    fn follow(&self) -> (Child, Lines<BufReader<ChildStdout>>) {
        let mut child = self.command(&["recv", "--follow"]).spawn().expect("it can be started");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        (child, lines)
    }
}

async fn prints(lines: &mut Lines<BufReader<ChildStdout>>, expected: &str) {
    let line = timeout(STUCK, lines.next_line())
        .await
        .unwrap_or_else(|_| panic!("{expected} is not printed"));
    assert_eq!(line.expect("readable").expect("a further line"), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn qpq_continues_at_another_edge_without_an_error() {
    let world = World::new().await;
    let (alice, bob) =
        (Person { world: &world, name: "alice" }, Person { world: &world, name: "bob" });
    alice.registered().await;
    bob.registered().await;
    let (mut following, mut lines) = bob.follow();
    alice.ok(&["send", "bob", "one"]).await;
    prints(&mut lines, "alice: one").await;
    world.kill_first().await;
    alice.ok(&["send", "bob", "two"]).await;
    prints(&mut lines, "alice: two").await;
    alice.ok(&["send", "bob", "three"]).await;
    prints(&mut lines, "alice: three").await;
    following.kill().await.unwrap();
    let said = following.wait_with_output().await.unwrap().stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(!said.to_lowercase().contains("error"), "{said}");
    println!("standard error of bob: {said:?}");
}
