//! The trace of a call in a cluster: the call, the operations of the stores, and the SQL.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use qpq_client::{Client, Identity, Options, Password, Trust, Username, methods, v1};
use qpq_test_services::{Nats, Postgres, Redis};
use tokio::process::Command;

use crate::{
    collector::{Collector, Span},
    harness::{Data, ServerProcess},
};

const USERNAME: &str = "an-unusual-username";

/// Returns the path of a binary of this build.
fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_qpq-server")).with_file_name(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path
}

/// Registers an account, logs in, sends a message to the account itself, and fetches the message.
async fn use_it(server: &ServerProcess, identity: &Identity) {
    let options = Options::new(server.address.to_string(), Trust::Pinned(server.fingerprint));
    let client = Client::new(options).unwrap();
    let username = Username::parse(USERNAME).unwrap();
    let password = Password::new(String::from("correct horse battery staple").into());
    client.register(&username, &password, identity, None).await.unwrap();
    client.login(&username, &password).await.unwrap();
    let message = v1::EnqueueRequest {
        recipient_key: identity.public().as_bytes().to_vec().into(),
        payload: b"a payload"[..].into(),
        ..Default::default()
    };
    client.call::<methods::Enqueue>(message).await.unwrap();
    let page = client.call::<methods::Fetch>(v1::FetchRequest::default()).await.unwrap();
    assert_eq!(page.payloads.len(), 1);
    client.close().await;
}

/// Returns the root span of the call with this name, and the other spans of its trace.
fn trace<'a>(spans: &'a [Span], call: &str) -> (&'a Span, Vec<&'a Span>) {
    let root = spans
        .iter()
        .find(|span| span.name() == call)
        .unwrap_or_else(|| panic!("no {call} in {spans:#?}"));
    assert!(root.inner.parent_span_id.is_empty());
    let below = |span: &&Span| span.inner.trace_id == root.inner.trace_id && span.name() != call;
    (root, spans.iter().filter(below).collect())
}

/// Returns the span with this name and parent, which must be within the parent's time.
fn child<'a>(spans: &[&'a Span], parent: &Span, name: &str) -> &'a Span {
    let found = spans
        .iter()
        .find(|span| span.name() == name && span.inner.parent_span_id == parent.inner.span_id)
        .unwrap_or_else(|| panic!("no {name} below {} in {spans:#?}", parent.name()));
    assert!(found.inner.start_time_unix_nano >= parent.inner.start_time_unix_nano);
    assert!(
        found.inner.end_time_unix_nano <= parent.inner.end_time_unix_nano,
        "{found:#?} {parent:#?}"
    );
    found
}

#[tokio::test]
async fn a_trace_has_the_call_the_operations_of_the_stores_and_the_sql() {
    let (postgres, redis, nats) =
        tokio::try_join!(Postgres::start(), Redis::start(), Nats::start()).unwrap();
    let (data, collector) = (Data::new(), Collector::start().await);
    let secrets = data.file("secrets");
    let made = Command::new(built("qpq-admin"))
        .arg("init")
        .arg("--out")
        .arg(&secrets)
        .output()
        .await
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let (postgres_url, redis_url, nats_url, url) =
        (postgres.url(), redis.url(), nats.url(), collector.url());
    let server = ServerProcess::start(
        data.path(),
        &[
            ("QPQ_POSTGRES__URL", &postgres_url),
            ("QPQ_REDIS__URL", &redis_url),
            ("QPQ_NATS__URL", &nats_url),
            ("QPQ_CLUSTER__SECRETS_DIR", secrets.to_str().unwrap()),
            ("QPQ_CLUSTER__MIGRATE", "at_start"),
            ("QPQ_TRACE__ENDPOINT", &url),
            ("QPQ_TRACE__SAMPLE", "1"),
        ],
    )
    .await;
    let identity = Identity::generate();
    use_it(&server, &identity).await;
    server.signal(Signal::SIGTERM);
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0), "{log}");
    let spans = collector.spans();

    let (call, below) = trace(&spans, "OpaqueRegisterFinish");
    let store = child(&below, call, "register");
    assert_eq!(store.get("db.system.name").as_deref(), Some("postgresql"));
    assert_eq!(store.get("retries").as_deref(), Some("0"));
    child(&below, store, "sql");

    // Messages of several calls are committed together. Each of these calls has the commit in its
    // trace.
    let (call, below) = trace(&spans, "Enqueue");
    let commit = child(&below, call, "commit");
    assert_eq!(commit.get("messages").as_deref(), Some("1"));
    child(&below, child(&below, commit, "enqueue"), "sql");

    let (_, below) = trace(&spans, "Fetch");
    assert!(
        below.iter().any(|span| span.get("db.system.name").as_deref() == Some("redis")),
        "{below:#?}"
    );

    let text = format!("{spans:?}");
    let key: Vec<_> =
        identity.public().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    for secret in [USERNAME, "127.0.0.1", "a payload", &key.concat()] {
        assert!(!text.contains(secret), "{secret} is in a trace");
    }
    for span in &spans {
        let known = ["attempt", "code", "db.system.name", "messages", "method", "retries"];
        assert!(span.keys().iter().all(|key| known.contains(key)), "{span:#?}");
    }
}
