//! Each service starts, answers, restarts after a kill, and leaves nothing at the end.

use std::{
    fs,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use qpq_test_services::{
    Nats, Postgres, Redis,
    proxy::{Link, TcpProxy, Way},
    resp::{Connection, Reply},
};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Returns whether a process accepts connections on a port of 127.0.0.1.
async fn listens(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).await.is_ok()
}

/// Returns the temporary directory of the server whose configuration or pid file names `port`.
fn home_of(port: u16) -> std::path::PathBuf {
    let temp = std::env::temp_dir().canonicalize().expect("a temporary directory");
    fs::read_dir(temp)
        .expect("it can be read")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            let of_redis = fs::read_to_string(path.join("redis.conf")).unwrap_or_default();
            let of_nats = fs::read_to_string(path.join("nats.conf")).unwrap_or_default();
            let of_postgres =
                fs::read_to_string(path.join("data/postmaster.pid")).unwrap_or_default();
            of_redis.contains(&format!("port {port}\n"))
                || of_nats.contains(&format!("port: {port}\n"))
                || of_postgres.lines().nth(3) == Some(&port.to_string())
        })
        .expect("a directory")
}

/// Returns the id of the shared memory (System V) of a Postgres, which survives a kill.
fn segment_of(home: &std::path::Path) -> String {
    let file = fs::read_to_string(home.join("data/postmaster.pid")).expect("Postgres runs");
    let line = file.lines().nth(6).expect("a seventh line");
    line.split_whitespace().nth(1).expect("an id").to_owned()
}

fn segment_exists(id: &str) -> bool {
    let segments = fs::read_to_string("/proc/sysvipc/shm").expect("Linux tells");
    segments.lines().any(|line| line.split_whitespace().nth(1) == Some(id))
}

#[tokio::test]
async fn postgres_keeps_committed_data_over_restarts_and_kills() {
    let postgres = Postgres::start().await.unwrap();
    let version: u32 = postgres.sql("SHOW server_version_num").await.unwrap().parse().unwrap();
    assert!(version >= 150_000, "{version}");
    assert_eq!(postgres.sql("SHOW fsync").await.unwrap(), "on");
    postgres.sql("CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await.unwrap();
    postgres.restart().await.unwrap();
    postgres.sql("INSERT INTO t VALUES (2)").await.unwrap();
    for _ in 0..3 {
        postgres.kill9().await.unwrap();
        assert!(!listens(postgres.port()).await, "it is killed");
        assert!(postgres.kill9().await.is_err(), "it is killed already");
        postgres.start_again().await.unwrap();
    }
    assert!(postgres.start_again().await.is_err(), "it runs already");
    assert_eq!(postgres.sql("SELECT n, n + 1 FROM t ORDER BY n").await.unwrap(), "1|2\n2|3");
}

#[tokio::test]
async fn postgres_requires_its_password_and_creates_databases() {
    let postgres =
        Postgres::start_with(&[("fsync", "off"), ("max_connections", "20")]).await.unwrap();
    assert_eq!(postgres.sql("SHOW fsync; SHOW max_connections").await.unwrap(), "off\n20");
    assert_eq!(postgres.sql("SHOW password_encryption").await.unwrap(), "scram-sha-256");
    let other = postgres.create_database("another").await.unwrap();
    assert!(postgres.create_database("another").await.is_err(), "there is one");
    let psql = |url: &str| {
        Command::new("psql")
            .args(["-XqAtw", "-c", "SELECT current_database()", url])
            .output()
            .unwrap()
    };
    assert_eq!(psql(&postgres.url()).stdout, b"qpq\n");
    assert_eq!(psql(&other).stdout, b"another\n");
    let (user, rest) = other.split_once("@").unwrap();
    let refused = psql(&format!("{user}x@{rest}"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("password authentication failed"));
}

#[tokio::test]
async fn redis_is_empty_after_a_restart_and_can_be_rolled_back() {
    let redis = Redis::start().await.unwrap();
    let mut connection = redis.connect().await.unwrap();
    assert_eq!(
        connection.command(["SET", "a", "1\r\n2"]).await.unwrap(),
        Reply::Status("OK".into())
    );
    assert_eq!(connection.command(["GET", "a"]).await.unwrap(), Reply::Bulk(b"1\r\n2".to_vec()));
    assert_eq!(connection.command(["GET", "none"]).await.unwrap(), Reply::Nil);
    assert_eq!(connection.command(["RPUSH", "l", "x", ""]).await.unwrap().integer().unwrap(), 2);
    let list = connection.command(["LRANGE", "l", "0", "-1"]).await.unwrap();
    assert_eq!(list.array().unwrap(), [Reply::Bulk(b"x".to_vec()), Reply::Bulk(Vec::new())]);
    let refused = connection.command(["INCR", "l"]).await.unwrap_err();
    assert!(refused.to_string().contains("WRONGTYPE"), "{refused}");

    let snapshot = redis.snapshot().await.unwrap();
    redis.command(["SET", "a", "later"]).await.unwrap();
    redis.roll_back_to(&snapshot).await.unwrap();
    assert_eq!(redis.command(["GET", "a"]).await.unwrap(), Reply::Bulk(b"1\r\n2".to_vec()));
    assert!(connection.command(["PING"]).await.is_err(), "that server was killed");

    redis.flush_all().await.unwrap();
    assert_eq!(redis.command(["DBSIZE"]).await.unwrap(), Reply::Integer(0));
    for _ in 0..2 {
        redis.command(["SET", "a", "1"]).await.unwrap();
        redis.restart().await.unwrap();
        assert_eq!(redis.command(["DBSIZE"]).await.unwrap(), Reply::Integer(0), "nothing is kept");
    }
    let stranger = Connection::open(redis.addr(), "wrong").await;
    assert!(stranger.unwrap_err().to_string().contains("WRONGPASS"));
}

#[tokio::test]
async fn redis_with_an_append_only_file_keeps_its_data() {
    let redis =
        Redis::start_with(&[("appendonly", "yes"), ("appendfsync", "always")]).await.unwrap();
    redis.command(["SET", "a", "1"]).await.unwrap();
    redis.kill9().await.unwrap();
    redis.start_again().await.unwrap();
    assert_eq!(redis.command(["GET", "a"]).await.unwrap(), Reply::Bulk(b"1".to_vec()));
}

#[tokio::test]
async fn nats_answers_after_every_restart() {
    let nats = Nats::start().await.unwrap();
    let port = nats.port();
    nats.ping().await.unwrap();
    nats.kill9().await.unwrap();
    assert!(nats.ping().await.is_err());
    nats.start_again().await.unwrap();
    nats.restart().await.unwrap();
    nats.ping().await.unwrap();
    assert_eq!(nats.port(), port);
    assert!(nats.url().ends_with(&format!("@127.0.0.1:{port}")));

    let mut stream = BufReader::new(TcpStream::connect(nats.addr()).await.unwrap());
    tokio::io::AsyncWriteExt::write_all(
        &mut stream,
        b"CONNECT {\"verbose\":false,\"user\":\"qpq\",\"pass\":\"x\"}\r\nPING\r\n",
    )
    .await
    .unwrap();
    let mut said = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut said).await.unwrap();
    assert!(said.contains("Authorization Violation"), "{said}");
}

#[tokio::test]
async fn a_frozen_server_answers_after_thaw() {
    let (redis, nats, postgres) =
        tokio::try_join!(Redis::start(), Nats::start(), Postgres::start()).unwrap();
    redis.freeze();
    nats.freeze();
    postgres.freeze();
    let (redis, nats, postgres) = (Arc::new(redis), Arc::new(nats), Arc::new(postgres));
    let mut waits = JoinSet::new();
    waits.spawn({
        let redis = Arc::clone(&redis);
        async move { redis.command(["PING"]).await.map(drop) }
    });
    waits.spawn({
        let nats = Arc::clone(&nats);
        async move { nats.ping().await }
    });
    waits.spawn({
        let postgres = Arc::clone(&postgres);
        async move { postgres.sql("SELECT 1").await.map(drop) }
    });
    assert!(timeout(Duration::from_millis(300), waits.join_next()).await.is_err(), "none answers");
    redis.thaw();
    nats.thaw();
    postgres.thaw();
    for answer in waits.join_all().await {
        answer.expect("each answers");
    }
    redis.freeze();
    redis.restart().await.expect("a frozen one can be stopped");
}

#[tokio::test]
async fn a_dropped_service_leaves_nothing() {
    let (postgres, redis, nats) =
        tokio::try_join!(Postgres::start(), Redis::start(), Nats::start()).unwrap();
    let ports = [postgres.port(), redis.port(), nats.port()];
    let homes = ports.map(home_of);
    let killed = Postgres::start().await.unwrap();
    let home_of_killed = home_of(killed.port());
    let segments = [segment_of(&homes[0]), segment_of(&home_of_killed)];
    killed.kill9().await.unwrap();
    assert!(segments.iter().all(|id| segment_exists(id)));
    drop((postgres, redis, nats, killed));
    for port in ports {
        assert!(!listens(port).await);
    }
    for home in homes.iter().chain([&home_of_killed]) {
        assert!(!home.exists(), "{} is removed", home.display());
    }
    assert!(!segments.iter().any(|id| segment_exists(id)), "no shared memory is left");
}

#[tokio::test]
async fn a_service_leaves_nothing_when_its_starter_is_killed() {
    let mut process = tokio::process::Command::new(env!("CARGO_BIN_EXE_qpq-services"))
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut ports = Vec::new();
    while ports.len() < 3 {
        let url = lines.next_line().await.unwrap().expect("three lines");
        let port = url.rsplit(':').next().unwrap().split('/').next().unwrap();
        ports.push(port.parse::<u16>().unwrap());
    }
    let homes: Vec<_> = ports.iter().map(|&port| home_of(port)).collect();
    for &port in &ports {
        assert!(listens(port).await);
    }
    process.kill().await.unwrap();
    timeout(PATIENCE, async {
        for (port, home) in ports.into_iter().zip(homes) {
            while home.exists() || listens(port).await {
                sleep(Duration::from_millis(5)).await;
            }
        }
    })
    .await
    .expect("the servers and their directories go with the process");
}

#[tokio::test]
async fn services_are_reachable_through_proxies() {
    let (postgres, redis) = tokio::try_join!(Postgres::start(), Redis::start()).unwrap();
    let random = || StdRng::seed_from_u64(1);
    let to_postgres = TcpProxy::start(postgres.addr(), random()).await.unwrap();
    let to_redis = TcpProxy::start(redis.addr(), random()).await.unwrap();
    let output = tokio::process::Command::new("psql")
        .args(["-XqAtw", "-c", "SELECT 1", &postgres.url_via(to_postgres.addr())])
        .output()
        .await
        .unwrap();
    assert_eq!(output.stdout, b"1\n", "{output:?}");
    assert_eq!(to_postgres.switch().tally().begun, 1);

    let mut connection = Connection::open(to_redis.addr(), redis.password()).await.unwrap();
    to_redis.switch().change(|f| f.link = Link::Blackhole(Way::Both));
    assert!(timeout(Duration::from_millis(100), connection.command(["PING"])).await.is_err());
    to_redis.switch().cut_all();
    to_redis.switch().heal();
    assert!(connection.command(["PING"]).await.is_err(), "it was cut");
    assert!(redis.url_via(to_redis.addr()).ends_with(&format!("@{}/", to_redis.addr())));
}
