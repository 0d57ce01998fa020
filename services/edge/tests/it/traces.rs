//! Traces of calls at a collector. They are sent only if configured, contain no data of accounts,
//! and delay no call.

use std::fs;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use nix::sys::signal::Signal;
use qpq_proto::{Method as _, methods::OpaqueLoginStart};
use qpq_transport::{Certificates, client::Connection};
use tokio::net::TcpListener;
use tonic::transport::Identity;

use crate::{
    collector::{Collector, Span},
    harness::{Data, HANGS, ServerProcess, health},
};

/// An id that no method has.
const UNKNOWN: u16 = 0xfffe;

async fn call(connection: &Connection, method: u16, payload: &'static [u8]) -> u8 {
    connection.call(method, Bytes::from_static(payload), 9, HANGS).await.unwrap().0
}

/// Calls a server and stops it immediately, which sends the remaining spans. Returns all spans and
/// the log.
async fn spans_of(variables: &[(&str, &str)]) -> (Vec<Span>, String) {
    let collector = Collector::start().await;
    let (data, url) = (Data::new(), collector.url());
    let variables: Vec<_> =
        [("QPQ_TRACE__ENDPOINT", &*url)].iter().chain(variables).copied().collect();
    let server = ServerProcess::start(data.path(), &variables).await;
    let connection = server.connect().await;
    health(&connection).await;
    assert_ne!(
        call(&connection, OpaqueLoginStart::INFO.id, b"not protobuf, alice@example.org").await,
        0
    );
    assert_ne!(call(&connection, UNKNOWN, b"").await, 0);
    server.signal(Signal::SIGTERM);
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0), "{log}");
    (collector.spans(), log)
}

#[tokio::test]
async fn every_sampled_call_is_a_span_with_method_and_code_regardless_of_the_log() {
    let asked =
        [("QPQ_TRACE__SAMPLE", "1"), ("QPQ_TRACE__SERVICE", "edge-of-a-test"), ("RUST_LOG", "off")];
    let (spans, log) = spans_of(&asked).await;
    assert_eq!(log, "", "the filter of the log does not apply to traces");
    let named = |name| spans.iter().filter(|span| span.name() == name).collect::<Vec<_>>();
    let (health, login) = (named("Health"), named("OpaqueLoginStart"));
    assert!(!health.is_empty() && login.len() == 1, "{spans:#?}");
    assert_eq!(health[0].get("code").as_deref(), Some("ok"));
    assert_eq!(login[0].get("code").as_deref(), Some("rpc.malformed"));
    for span in &spans {
        assert_eq!(span.service, "edge-of-a-test");
        assert_eq!(span.keys(), ["code", "method"], "a span has nothing else of a call");
        assert!(
            span.inner.events.is_empty()
                && span.inner.parent_span_id.is_empty()
                && !span.is_error()
        );
    }
}

#[tokio::test]
async fn nothing_is_sent_without_samples_or_without_a_collector() {
    let (spans, _) = spans_of(&[("QPQ_TRACE__SAMPLE", "0")]).await;
    assert!(spans.is_empty(), "{spans:#?}");
    let data = Data::new();
    let server =
        ServerProcess::start(data.path(), &[("QPQ_TRACE__SAMPLE", "1"), ("RUST_LOG", "debug")])
            .await;
    server.health().await;
    server.signal(Signal::SIGTERM);
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0));
    assert!(!log.contains("opentelemetry"), "{log}");
}

#[tokio::test]
async fn an_unreachable_or_silent_collector_costs_spans_and_nothing_else() {
    // The first refuses connections, the second accepts them and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let away = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for collector in [away, silent.local_addr().unwrap()] {
        let (data, url) = (Data::new(), format!("http://{collector}"));
        let variables = [
            ("QPQ_TRACE__ENDPOINT", &*url),
            ("QPQ_TRACE__SAMPLE", "1"),
            ("QPQ_TRACE__TIMEOUT", "1s"),
            // The queue is full, and exports fail, during the calls.
            ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
            ("OTEL_BSP_SCHEDULE_DELAY", "1"),
        ];
        let server = ServerProcess::start(data.path(), &variables).await;
        let connection = server.connect().await;
        for _ in 0..200 {
            health(&connection).await;
        }
        server.signal(Signal::SIGTERM);
        let (code, log) = server.ended().await;
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("opentelemetry"), "the operator is notified: {log}");
    }
}

#[tokio::test]
async fn spans_arrive_while_the_server_runs() {
    let mut collector = Collector::start().await;
    let (data, url) = (Data::new(), collector.url());
    let variables = [("QPQ_TRACE__ENDPOINT", &*url), ("QPQ_TRACE__SAMPLE", "1")];
    let server = ServerProcess::start(data.path(), &variables).await;
    server.health().await;
    let spans = collector.until(|spans| spans.iter().any(|span| span.name() == "Health")).await;
    assert_eq!(spans[0].service, "qpq-server");
}

#[tokio::test]
async fn spans_are_sent_over_tls_if_the_system_trusts_the_collector() {
    let data = Data::new();
    let (cert, key, roots) =
        (data.file("collector.der"), data.file("collector-key.der"), data.file("roots.pem"));
    Certificates::load_or_create(&cert, &key, &["localhost".into()]).unwrap();
    let pem = |file, label| {
        let text = BASE64_STANDARD.encode(fs::read(file).unwrap());
        format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
    };
    fs::write(&roots, pem(&cert, "CERTIFICATE")).unwrap();
    let identity = Identity::from_pem(pem(&cert, "CERTIFICATE"), pem(&key, "PRIVATE KEY"));
    let collector = Collector::start_tls(identity).await;
    let url = collector.tls_url();
    for trusted in [true, false] {
        let mut variables = vec![("QPQ_TRACE__ENDPOINT", &*url), ("QPQ_TRACE__SAMPLE", "1")];
        if trusted {
            variables.push(("SSL_CERT_FILE", roots.to_str().unwrap()));
        }
        let own = Data::new();
        let server = ServerProcess::start(own.path(), &variables).await;
        server.health().await;
        let before = collector.spans().len();
        server.signal(Signal::SIGTERM);
        let (code, log) = server.ended().await;
        assert_eq!(code, Some(0), "{log}");
        assert_eq!(collector.spans().len() > before, trusted, "{log}");
    }
}
