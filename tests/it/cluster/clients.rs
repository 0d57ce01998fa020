//! A client whose edge dies goes on at another, in the same session: the SDK and `qpq` show it as a
//! blink, not as an error.

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
/// For what a client does by itself; it takes an edge for dead after a minute of silence at the
/// latest.
const STUCK: Duration = Duration::from_secs(150);

struct World {
    cluster: Cluster,
    balancer: Balancer,
    edges: Vec<SocketAddr>,
}

impl World {
    /// Two edges, of which the balancer uses the first.
    async fn new() -> Self {
        let plan = Plan { edges: 2, place: Place::Apart, ..Plan::default() };
        let cluster = Cluster::start(plan).await.expect("a cluster");
        let edges = cluster.fleet().addrs.to_vec();
        let balancer = Balancer::start(&edges[..1]).await.expect("a balancer");
        Self { cluster, balancer, edges }
    }

    /// The edge dies, and whoever comes anew is sent to the other.
    async fn first_dies(&self) {
        self.balancer.aim(&self.edges[1..]);
        self.cluster.kill_edge(0).await.expect("it dies");
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::from(self.cluster.fleet().pin.0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_goes_on_at_another_edge_with_the_same_token() {
    let world = World::new().await;
    let account = world.cluster.accounts(1).await.unwrap().remove(0);
    let mut options =
        Options::new(world.balancer.addr().to_string(), Trust::Pinned(world.fingerprint()));
    // As much as it takes; by default a call gives up after half a minute.
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
    world.first_dies().await;
    for n in 4..=6 {
        let receipt =
            timeout(STUCK, client.call::<Enqueue>(send(n))).await.expect("it goes on").unwrap();
        assert_eq!((receipt.seq, receipt.duplicate), (u64::from(n), false));
    }
    let page = client.call::<Peek>(v1::PeekRequest::default()).await.unwrap().payloads;
    let shown: Vec<u8> = page.iter().map(|envelope| envelope.data[0]).collect();
    assert_eq!(shown, [1, 2, 3, 4, 5, 6]);
}

/// Somebody with a home of their own.
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
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{} {arguments:?}: {said}", self.name);
    }

    async fn registered(&self) {
        let pin = self.world.fingerprint().to_string();
        self.ok(&["register", self.name, "--pin", &pin]).await;
    }

    fn follow(&self) -> (Child, Lines<BufReader<ChildStdout>>) {
        let mut child = self.command(&["recv", "--follow"]).spawn().expect("it runs");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        (child, lines)
    }
}

async fn hears(lines: &mut Lines<BufReader<ChildStdout>>, expected: &str) {
    let line = timeout(STUCK, lines.next_line())
        .await
        .unwrap_or_else(|_| panic!("{expected} does not come"));
    assert_eq!(line.expect("it can be read").expect("it ended instead"), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn qpq_goes_on_at_another_edge_without_an_error() {
    let world = World::new().await;
    let (alice, bob) =
        (Person { world: &world, name: "alice" }, Person { world: &world, name: "bob" });
    alice.registered().await;
    bob.registered().await;
    let (mut following, mut lines) = bob.follow();
    alice.ok(&["send", "bob", "one"]).await;
    hears(&mut lines, "alice: one").await;
    world.first_dies().await;
    alice.ok(&["send", "bob", "two"]).await;
    hears(&mut lines, "alice: two").await;
    alice.ok(&["send", "bob", "three"]).await;
    hears(&mut lines, "alice: three").await;
    following.kill().await.unwrap();
    let said = following.wait_with_output().await.unwrap().stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(!said.to_lowercase().contains("error"), "{said}");
    println!("what bob saw of it: {said:?}");
}
