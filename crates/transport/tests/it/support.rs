//! A service that reports its steps, a server for it, and a client that writes raw bytes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use qpq_transport::{
    Certificates, ClusterEdge, Config, DeliveryObserver, EventSink, Peer, Reply, Server, Service,
    client::{Connection, Dialer, Trust},
};
use qpq_wire::{Refusal, Request, RequestHeader, Response};
use quinn::{RecvStream, SendStream, crypto::rustls::QuicClientConfig};
use rustls::pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::sync::{Semaphore, mpsc};

/// The methods of the service.
pub(crate) mod method {
    /// Answers with the payload.
    pub(crate) const ECHO: u16 = 1;
    /// Never answers.
    pub(crate) const PARK: u16 = 2;
    /// Waits for a permit, then answers with the payload.
    pub(crate) const GATE: u16 = 3;
    /// Waits as `GATE` does, and reports the delivery of the answer.
    pub(crate) const OBSERVED: u16 = 4;
    /// Answers with `n` bytes, where `n` is the payload as a `u32`, and reports the delivery.
    pub(crate) const BULK: u16 = 5;
    /// Panics.
    pub(crate) const PANIC: u16 = 6;
    /// Sends the payload as event 1. Answers with the error if that fails.
    pub(crate) const EVENT: u16 = 7;
    /// Unknown to the service.
    pub(crate) const UNKNOWN: u16 = 999;
}

pub(crate) mod status {
    pub(crate) const OK: u8 = 0;
    pub(crate) const REFUSED: u8 = 1;
    pub(crate) const UNKNOWN_METHOD: u8 = 11;
}

/// A step of the service.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Report {
    Connected(Peer),
    Disconnected,
    Started(u32),
    /// A call was dropped before its end.
    Cancelled(u32),
    Delivered(u32),
    Lost(u32),
    /// An observer was dropped without a notification.
    Dropped(u32),
    Draining,
}

pub(crate) struct Probe {
    reports: mpsc::UnboundedSender<Report>,
    pub(crate) gate: Semaphore,
}

pub(crate) struct Session {
    events: EventSink,
}

impl Probe {
    fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Report>) {
        let (sender, reports) = mpsc::unbounded_channel();
        (Arc::new(Self { reports: sender, gate: Semaphore::new(0) }), reports)
    }

    fn report(&self, report: Report) {
        // Fails only after the end of the test.
        let _ = self.reports.send(report);
    }
}

impl Service for Probe {
    type Connection = Session;

    fn connected(&self, peer: Peer, events: EventSink) -> Arc<Session> {
        self.report(Report::Connected(peer));
        Arc::new(Session { events })
    }

    fn disconnected(&self, _conn: &Session) {
        self.report(Report::Disconnected);
    }

    fn admit(&self, _conn: &Session, header: &RequestHeader) -> Result<(), Reply> {
        if header.method_id == method::UNKNOWN {
            return Err(Reply::new(status::UNKNOWN_METHOD, Bytes::new()));
        }
        Ok(())
    }

    async fn call(self: Arc<Self>, conn: Arc<Session>, request: Request) -> Reply {
        let id = request.request_id;
        let mut running = Running { probe: Arc::clone(&self), id: Some(id) };
        self.report(Report::Started(id));
        let reply = match request.method_id {
            method::PARK => std::future::pending().await,
            method::GATE => {
                self.gate.acquire().await.unwrap().forget();
                Reply::new(status::OK, request.payload)
            }
            method::OBSERVED => {
                self.gate.acquire().await.unwrap().forget();
                self.observed(id, request.payload)
            }
            method::BULK => {
                let len = u32::from_be_bytes(request.payload[..].try_into().unwrap());
                self.observed(id, vec![7; len as usize].into())
            }
            method::PANIC => panic!("as requested"),
            method::EVENT => match conn.events.send(1, request.payload) {
                Ok(()) => Reply::new(status::OK, Bytes::new()),
                Err(error) => Reply::new(status::REFUSED, error.to_string().into()),
            },
            _ => Reply::new(status::OK, request.payload),
        };
        running.id = None;
        reply
    }

    fn refuse(&self, _conn: &Session, header: Option<&RequestHeader>, why: Refusal) -> Reply {
        let method = header.map(|header| header.method_id);
        Reply::new(status::REFUSED, format!("{why:?} {method:?}").into())
    }

    async fn draining(&self, _deadline: Duration) {
        self.report(Report::Draining);
    }
}

impl Probe {
    fn observed(self: &Arc<Self>, id: u32, payload: Bytes) -> Reply {
        let observer = Observed { probe: Arc::clone(self), id: Some(id) };
        Reply { on_delivery: Some(Box::new(observer)), ..Reply::new(status::OK, payload) }
    }
}

struct Running {
    probe: Arc<Probe>,
    id: Option<u32>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.probe.report(Report::Cancelled(id));
        }
    }
}

struct Observed {
    probe: Arc<Probe>,
    id: Option<u32>,
}

impl DeliveryObserver for Observed {
    fn delivered(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        let id = self.id.take().unwrap();
        Box::pin(async move { self.probe.report(Report::Delivered(id)) })
    }

    fn lost(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        let id = self.id.take().unwrap();
        Box::pin(async move { self.probe.report(Report::Lost(id)) })
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.probe.report(Report::Dropped(id));
        }
    }
}

/// A server with its service and the reports of the service.
pub(crate) struct Harness {
    pub(crate) server: Server<Probe>,
    pub(crate) probe: Arc<Probe>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) directory: TempDir,
    pub(crate) reports: mpsc::UnboundedReceiver<Report>,
}

fn certificates_in(directory: &Path) -> Arc<Certificates> {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    Certificates::load_or_create(&directory.join("cert.der"), &directory.join("key.der"), &names)
        .unwrap()
}

pub(crate) fn config() -> Config {
    Config::new((Ipv4Addr::LOCALHOST, 0).into())
}

impl Harness {
    pub(crate) fn start() -> Self {
        Self::with(config())
    }

    pub(crate) fn with(config: Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let certificates = certificates_in(directory.path());
        let (probe, reports) = Probe::new();
        let server = Server::bind(config, Arc::clone(&certificates), Arc::clone(&probe)).unwrap();
        Self { server, probe, certificates, directory, reports }
    }

    /// Starts one edge of a cluster with the certificate in `shared`, which the first edge creates.
    pub(crate) fn in_cluster(edge: ClusterEdge, config: Config, shared: &Path) -> Self {
        certificates_in(shared);
        let directory = tempfile::tempdir().unwrap();
        for name in ["cert.der", "key.der"] {
            std::fs::copy(shared.join(name), directory.path().join(name)).unwrap();
        }
        let certificates = certificates_in(directory.path());
        let (probe, reports) = Probe::new();
        let server =
            Server::bind_in_cluster(edge, config, Arc::clone(&certificates), Arc::clone(&probe))
                .unwrap();
        Self { server, probe, certificates, directory, reports }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    pub(crate) fn cert_path(&self) -> PathBuf {
        self.directory.path().join("cert.der")
    }

    /// Waits for this report and skips others.
    pub(crate) async fn wait_for(&mut self, wanted: Report) {
        while self.next_report().await != wanted {}
    }

    pub(crate) async fn next_report(&mut self) -> Report {
        within(self.reports.recv()).await.expect("the service is running")
    }

    /// Returns the reports that the test has not waited for.
    pub(crate) fn reported(&mut self) -> Vec<Report> {
        std::iter::from_fn(|| self.reports.try_recv().ok()).collect()
    }

    pub(crate) fn dialer(&self) -> Dialer {
        Dialer::new(Trust::Pin(self.certificates.fingerprint())).unwrap()
    }

    pub(crate) async fn connect(&self) -> Connection {
        within(self.dialer().connect(self.addr(), "localhost")).await.unwrap()
    }

    pub(crate) async fn raw(&self) -> Raw {
        Raw::connect(self, self.addr(), quinn::TransportConfig::default()).await
    }
}

/// Fails a test that hangs. The limit is far above the duration of any test.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("the test hangs")
}

/// A client that writes raw bytes.
pub(crate) struct Raw {
    pub(crate) quic: quinn::Connection,
}

impl Raw {
    pub(crate) async fn connect(
        harness: &Harness,
        addr: SocketAddr,
        transport: quinn::TransportConfig,
    ) -> Self {
        let mut config = quinn_config(raw_tls(harness));
        config.transport_config(Arc::new(transport));
        let endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let quic = within(endpoint.connect_with(config, addr, "localhost").unwrap()).await.unwrap();
        Self { quic }
    }

    /// Opens a stream and writes. The stream stays open.
    pub(crate) async fn open(&self, bytes: &[u8]) -> (SendStream, RecvStream) {
        let (mut send, recv) = within(self.quic.open_bi()).await.unwrap();
        within(send.write_all(bytes)).await.unwrap();
        (send, recv)
    }

    /// Opens a stream, writes and ends the stream.
    pub(crate) async fn ask(&self, bytes: &[u8]) -> (SendStream, RecvStream) {
        let (mut send, recv) = self.open(bytes).await;
        send.finish().unwrap();
        (send, recv)
    }

    pub(crate) async fn exchange(&self, bytes: &[u8]) -> Response {
        answer(self.ask(bytes).await.1).await
    }
}

/// Reads the one response of a stream.
pub(crate) async fn answer(mut recv: RecvStream) -> Response {
    let bytes = within(recv.read_to_end(16 << 20)).await.unwrap();
    Response::decode(bytes.into()).unwrap()
}

pub(crate) fn frame(method_id: u16, request_id: u32, payload: &[u8]) -> Vec<u8> {
    let payload = Bytes::copy_from_slice(payload);
    Request { method_id, request_id, payload }.encode().unwrap().to_vec()
}

pub(crate) fn raw_tls(harness: &Harness) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(std::fs::read(harness.cert_path()).unwrap())).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"qpq".to_vec()];
    tls
}

pub(crate) fn quinn_config(tls: rustls::ClientConfig) -> quinn::ClientConfig {
    quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}
