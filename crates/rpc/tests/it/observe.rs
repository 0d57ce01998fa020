//! The log and the metrics: every call once, without secrets and personal data.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use base64::Engine as _;
use bytes::Bytes;
use futures_util::FutureExt as _;
use metrics::{
    Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};
use parking_lot::Mutex;
use qpq_domain::SessionToken;
use qpq_proto::{
    METHODS,
    methods::{Enqueue, Fetch, FetchWait, Health, Logout, OpaqueLoginFinish, ResolveUser},
    v1::{
        EnqueueRequest, FetchRequest, FetchWaitRequest, HealthRequest, LogoutRequest,
        ResolveUserRequest,
    },
};
use qpq_wire::Refusal;
use tracing_subscriber::fmt::MakeWriter;

use crate::harness::{Server, registration};

/// Captured log lines.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Log {
    /// Captures the log of this thread as filtered by `directives`.
    fn capture(directives: &str) -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(directives)
            .with_ansi(false)
            .with_writer(log.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).expect("UTF-8")
    }

    /// Returns the lines of the access log without their times.
    fn access(&self) -> Vec<String> {
        let text = self.text();
        let lines = text.lines().filter_map(|line| line.split_once(" qpq::access: "));
        lines
            .map(|(head, line)| {
                format!("{} {line}", head.split_whitespace().last().expect("a level"))
            })
            .collect()
    }
}

/// Counters and histograms in memory.
#[derive(Default)]
struct Metrics {
    counters: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
    histograms: Mutex<BTreeMap<String, Arc<Samples>>>,
}

#[derive(Default)]
struct Samples(Mutex<Vec<f64>>);

impl HistogramFn for Samples {
    fn record(&self, value: f64) {
        self.0.lock().push(value);
    }
}

fn series(key: &Key) -> String {
    let labels: Vec<_> =
        key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
    format!("{}{{{}}}", key.name(), labels.join(","))
}

impl Recorder for Metrics {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::clone(self.counters.lock().entry(series(key)).or_default()))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::clone(self.histograms.lock().entry(series(key)).or_default()))
    }
}

impl Metrics {
    /// Returns the counters of calls that are not zero.
    fn calls(&self) -> BTreeMap<String, u64> {
        let counters = self.counters.lock();
        let calls = counters.iter().filter_map(|(key, count)| {
            let label = key.strip_prefix("qpq_rpc_calls_total")?;
            Some((label.to_owned(), count.load(Ordering::SeqCst)))
        });
        calls.filter(|(_, count)| *count > 0).collect()
    }

    fn samples(&self, method: &str) -> usize {
        let histograms = self.histograms.lock();
        histograms
            .get(&format!("qpq_rpc_seconds{{method={method}}}"))
            .map_or(0, |samples| samples.0.lock().len())
    }
}

/// Runs `scenario` with its own recorder.
fn recorded<F: Future<Output = ()>>(scenario: impl FnOnce() -> F) -> Metrics {
    let metrics = Metrics::default();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    metrics::with_local_recorder(&metrics, || runtime.block_on(scenario()));
    metrics
}

#[test]
fn every_call_is_counted_once_by_method_and_code() {
    let metrics = recorded(|| async {
        let server = Server::start().await;
        let alice = server.user("alice").await;
        let client = &alice.client;
        for _ in 0..3 {
            client.call::<Health>(HealthRequest {}).await.expect("needs no session");
        }
        for name in ["alice", "nobody"] {
            let request = ResolveUserRequest { username: name.into(), ..Default::default() };
            let _ = client.call::<ResolveUser>(request).await;
        }
        client.log_in("alice", "wrong").await.expect_err("a wrong password");
        client.raw(9999, Bytes::new()).await;
        let later = METHODS.iter().find(|method| !method.served).expect("some are not served yet");
        client.raw(later.id, Bytes::new()).await;
        server.rpc.admit(&client.conn, 9999, 1).expect_err("unknown");
        server.rpc.refuse(&client.conn, Some(200), Refusal::Timeout);
        // The client resets a waiting call.
        let wait = client.call::<FetchWait>(FetchWaitRequest::default());
        assert!(wait.now_or_never().is_none());
    });
    let expected = [
        ("Enqueue", "rpc.slow_request", 1),
        ("FetchWait", "cancelled", 1),
        ("Health", "ok", 3),
        ("OpaqueLoginFinish", "auth.failed", 1),
        ("OpaqueLoginFinish", "ok", 1),
        ("OpaqueLoginStart", "ok", 2),
        ("OpaqueRegisterFinish", "ok", 1),
        ("OpaqueRegisterStart", "ok", 1),
        ("ResolveUser", "ok", 1),
        ("ResolveUser", "users.not_found", 1),
        ("unknown", "rpc.unknown_method", 3),
    ];
    let expected: BTreeMap<_, _> = expected
        .into_iter()
        .map(|(method, code, n)| (format!("{{method={method},code={code}}}"), n))
        .collect();
    assert_eq!(metrics.calls(), expected);
    assert_eq!((metrics.samples("Health"), metrics.samples("ResolveUser")), (3, 2));
}

#[tokio::test]
async fn every_call_has_one_line_at_debug_for_ok_and_info_for_refusals() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let (log, guard) = Log::capture("debug");
    alice.client.call::<Health>(HealthRequest {}).await.expect("needs no session");
    let request = ResolveUserRequest { username: "nobody".into(), ..Default::default() };
    alice.client.call::<ResolveUser>(request).await.expect_err("nobody");
    alice.client.raw(9999, Bytes::from_static(b"123")).await;
    drop(guard);
    let lines = log.access();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    assert!(lines[0].starts_with("DEBUG method=\"Health\" code=\"ok\" us="), "{}", lines[0]);
    assert!(lines[0].contains(" bytes_in=0 bytes_out="), "{}", lines[0]);
    assert!(
        lines[1].starts_with("INFO method=\"ResolveUser\" code=\"users.not_found\" us="),
        "{}",
        lines[1]
    );
    assert!(lines[1].contains(" bytes_in=8 bytes_out="), "{}", lines[1]);
    assert!(
        lines[2].starts_with("INFO method=\"unknown\" code=\"rpc.unknown_method\" us="),
        "{}",
        lines[2]
    );

    let (log, _guard) = Log::capture("info");
    alice.client.call::<Health>(HealthRequest {}).await.expect("needs no session");
    let own = ResolveUserRequest { username: "alice".into(), ..Default::default() };
    alice.client.call::<ResolveUser>(own).await.expect("alice herself");
    assert_eq!(log.text(), "");
}

#[tokio::test]
async fn refusals_and_failures_are_logged_at_a_limited_rate_per_code() {
    let server = Server::start().await;
    let client = server.connect();
    let (log, _guard) = Log::capture("info");
    for _ in 0..100 {
        client.raw(9999, Bytes::new()).await;
        server.rpc.refuse(&client.conn, Some(200), Refusal::Internal);
    }
    server.rpc.refuse(&client.conn, Some(200), Refusal::Timeout);
    let text = log.text();
    let lines = |part: &str| text.lines().filter(|line| line.contains(part)).count();
    for code in ["rpc.unknown_method", "rpc.internal"] {
        assert_eq!(lines("INFO qpq::access: method="), 11, "{text}");
        assert!(lines(code) >= 5, "{text}");
    }
    assert_eq!(lines("ERROR qpq::rpc"), 5, "{text}");
    assert_eq!(lines("rpc.slow_request"), 1, "another code");
    assert!(text.contains("suppressed=0"), "{text}");
}

#[tokio::test]
async fn a_server_failure_is_logged_with_its_cause_and_a_refusal_is_not() {
    let server = Server::start().await;
    let client = server.connect();
    let (log, _guard) = Log::capture("info");
    client.log_in("alice", "password").await.expect_err("no such user");
    assert!(!log.text().contains("qpq::rpc"), "{}", log.text());
    server.rpc.refuse(&client.conn, Some(200), Refusal::Internal);
    let text = log.text();
    let fault = text.lines().find(|line| line.contains("ERROR qpq::rpc")).expect("an error");
    assert!(fault.contains("method=\"Enqueue\"") && fault.contains("a call panicked"), "{fault}");
}

/// Returns the usual representations of bytes in logs.
fn forms(secret: &[u8]) -> Vec<String> {
    let list = format!("{secret:?}");
    let base64 = [
        base64::engine::general_purpose::STANDARD_NO_PAD.encode(secret),
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(secret),
    ];
    let hex = [hex::encode(secret), hex::encode_upper(secret)];
    let lists = [
        list.trim_matches(['[', ']']).to_owned(),
        list.replace(' ', "").trim_matches(['[', ']']).to_owned(),
    ];
    [base64, hex, lists].into_iter().flatten().chain([secret.escape_ascii().to_string()]).collect()
}

#[test]
fn no_token_key_name_or_address_is_in_any_log_line_or_label() {
    let (log, guard) = Log::capture("trace");
    let secrets = Mutex::new(Vec::new());
    let metrics = recorded(|| async {
        let server = Server::start().await;
        let ip: IpAddr = "203.0.113.77".parse().expect("an address");
        let client = server.connect_from((ip, 54_321).into());
        let user = server.user("zaphod-beeblebrox").await;
        let upload =
            client.upload("zaphod-beeblebrox", "passw0rd-of-zaphod").await.expect("an upload");
        client
            .register("zaphod-beeblebrox", "passw0rd-of-zaphod", &user.identity)
            .await
            .expect_err("taken");
        let finish = client
            .start_login("zaphod-beeblebrox", "passw0rd-of-zaphod")
            .await
            .expect("KE2")
            .finish();
        client.call::<OpaqueLoginFinish>(finish.clone()).await.expect_err("a wrong password");
        let request =
            ResolveUserRequest { username: "zaphod-beeblebrox".into(), ..Default::default() };
        client.call_with::<ResolveUser>(request.clone(), &user.token).await.expect("a session");
        client.call_with::<ResolveUser>(request, &[0xa7; 32]).await.expect_err("no session");
        let payload = Bytes::from_static(b"ciphertext of a private matter");
        let recipient_key = Bytes::copy_from_slice(user.identity.as_bytes());
        let enqueue =
            EnqueueRequest { recipient_key, payload: payload.clone(), ..Default::default() };
        client.call::<Enqueue>(enqueue).await.expect("a session");
        client.call::<Fetch>(FetchRequest::default()).await.expect("a session");
        let bad = registration("zaphod@beeblebrox", &upload, &user.identity);
        client.call::<qpq_proto::methods::OpaqueRegisterFinish>(bad).await.expect_err("no name");
        client
            .call::<Logout>(LogoutRequest { all_sessions: true, ..Default::default() })
            .await
            .expect("a session");
        client.call::<Fetch>(FetchRequest::default()).await.expect_err("no session");

        let token = SessionToken::try_from(&user.token[..]).expect("32 bytes");
        let bytes = [
            user.token.to_vec(),
            token.hash().as_bytes().to_vec(),
            vec![0xa7; 32],
            user.identity.as_bytes().to_vec(),
            user.signing.to_bytes().to_vec(),
            upload,
            finish.finalization.to_vec(),
            payload.to_vec(),
        ];
        let mut secrets = secrets.lock();
        secrets.extend(bytes.iter().flat_map(|bytes| forms(bytes)));
        secrets.extend(["zaphod", "passw0rd", "203.0.113.77", "54321"].map(String::from));
    });
    drop(guard);
    let output = format!("{}{:?}", log.text(), metrics.counters.lock().keys());
    assert!(output.contains("OpaqueLoginFinish"), "the log was captured");
    for secret in secrets.into_inner() {
        assert!(!output.contains(&secret), "{secret} was logged");
    }
}
