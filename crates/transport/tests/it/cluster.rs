//! Several edges with the same keys: tickets and tokens of one are accepted by all, and no edge
//! ends a connection of another.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::hmac;
use qpq_transport::{
    ClusterEdge, ClusterKeyFiles, ClusterKeys, ClusterKeysError, Config, KeyReload, KeyRing,
    client::{Connection, Lost},
};
use quinn::Endpoint;
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tempfile::TempDir;

use crate::{
    relay::Relay,
    support::{Harness, answer, config, frame, method, quinn_config, raw_tls, within},
};

const RESET_KEY: [u8; 32] = *b"the reset key of all these edges";
const MINUTE: Duration = Duration::from_secs(60);

/// A directory with the keys, and with the certificate of the first edge.
struct Cluster(TempDir);

impl Cluster {
    fn new() -> Self {
        let cluster = Self(tempfile::tempdir().unwrap());
        cluster.put("tickets", &KeyRing::generate());
        cluster.put("tokens", &KeyRing::generate());
        fs::write(cluster.path("reset"), RESET_KEY).unwrap();
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, ring: &KeyRing) {
        fs::write(self.path(name), &ring.to_bytes()[..]).unwrap();
    }

    fn rotate(&self, name: &str) {
        let ring = KeyRing::parse(&fs::read(self.path(name)).unwrap()).unwrap();
        self.put(name, &ring.rotated());
    }

    fn files(&self) -> ClusterKeyFiles {
        let path = |name| self.path(name);
        ClusterKeyFiles { tickets: path("tickets"), tokens: path("tokens"), reset: path("reset") }
    }

    /// Loads the keys for one edge.
    fn keys(&self) -> Arc<ClusterKeys> {
        ClusterKeys::load(self.files()).unwrap()
    }

    fn edge(&self, name: Option<&str>, config: Config) -> Edge {
        let keys = self.keys();
        let edge = ClusterEdge { keys: Arc::clone(&keys), name: name.map(Into::into) };
        Edge { keys, harness: Harness::in_cluster(edge, config, self.0.path()) }
    }
}

struct Edge {
    keys: Arc<ClusterKeys>,
    harness: Harness,
}

/// Counts the verified certificates. A resumed handshake verifies none.
#[derive(Debug)]
struct CountingVerifier {
    verifier: Arc<WebPkiServerVerifier>,
    checked: AtomicUsize,
}

impl ServerCertVerifier for CountingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.checked.fetch_add(1, Ordering::SeqCst);
        self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        panic!("TLS 1.2");
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// A client that resumes sessions if it can.
struct ResumingClient {
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    verifier: Arc<CountingVerifier>,
}

#[derive(Debug, PartialEq)]
enum Handshake {
    Full,
    Resumed,
}

impl ResumingClient {
    /// Creates a client that trusts the certificate of this edge and its cluster.
    fn of(edge: &Edge) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(fs::read(edge.harness.cert_path()).unwrap().into()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
        let verifier = Arc::new(CountingVerifier { verifier, checked: AtomicUsize::new(0) });
        let mut tls = raw_tls(&edge.harness);
        tls.dangerous().set_certificate_verifier(Arc::clone(&verifier) as _);
        tls.resumption = Resumption::in_memory_sessions(8);
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        Self { endpoint, config: quinn_config(tls), verifier }
    }

    /// Connects, makes a call, and closes. The ticket arrives before the answer.
    async fn visit(&self, edge: &Edge) -> Handshake {
        let before = self.verifier.checked.load(Ordering::SeqCst);
        let connecting =
            self.endpoint.connect_with(self.config.clone(), edge.harness.addr(), "localhost");
        let connection = within(connecting.unwrap()).await.unwrap();
        let (mut send, recv) = within(connection.open_bi()).await.unwrap();
        send.write_all(&frame(method::ECHO, 1, b"here")).await.unwrap();
        send.finish().unwrap();
        assert_eq!(&answer(recv).await.payload[..], b"here");
        connection.close(0u32.into(), b"");
        let checked = self.verifier.checked.load(Ordering::SeqCst) - before;
        if checked == 0 { Handshake::Resumed } else { Handshake::Full }
    }
}

#[tokio::test]
async fn a_ticket_is_accepted_by_edges_with_the_same_keys_and_by_no_others() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.edge(None, config()), cluster.edge(None, config()));
    let other = {
        let other = Cluster::new();
        for name in ["cert.der", "key.der"] {
            fs::copy(cluster.path(name), other.path(name)).unwrap();
        }
        other.edge(None, config())
    };
    let client = ResumingClient::of(&one);
    assert_eq!(client.visit(&one).await, Handshake::Full);
    assert_eq!(client.visit(&two).await, Handshake::Resumed);
    assert_eq!(client.visit(&one).await, Handshake::Resumed);
    assert_eq!(client.visit(&other).await, Handshake::Full);
    assert_eq!(
        client.visit(&two).await,
        Handshake::Full,
        "the last ticket is one of the other cluster"
    );
}

#[tokio::test]
async fn a_ticket_is_accepted_across_one_rotation_and_refused_after_two() {
    let cluster = Cluster::new();
    let (slow, quick) = (cluster.edge(None, config()), cluster.edge(None, config()));
    let client = ResumingClient::of(&slow);
    assert_eq!(client.visit(&slow).await, Handshake::Full);
    cluster.rotate("tickets");
    assert_eq!(quick.keys.reload().unwrap(), KeyReload::Changed);
    assert_eq!(quick.keys.reload().unwrap(), KeyReload::Unchanged);
    assert_eq!(client.visit(&quick).await, Handshake::Resumed);
    // A ticket of the new key, at an edge with the old ring.
    assert_eq!(client.visit(&slow).await, Handshake::Resumed);
    // A ticket of a key that is no longer in the ring.
    cluster.rotate("tickets");
    quick.keys.reload().unwrap();
    assert_eq!(client.visit(&quick).await, Handshake::Full);
}

#[tokio::test]
async fn the_watch_reloads_changed_keys() {
    let cluster = Cluster::new();
    let (still, watching) = (cluster.edge(None, config()), cluster.edge(None, config()));
    let client = ResumingClient::of(&still);
    client.visit(&still).await;
    assert_eq!(client.visit(&watching).await, Handshake::Resumed);
    let watch = tokio::spawn(Arc::clone(&watching.keys).watch(Duration::from_millis(5)));
    cluster.put("tickets", &KeyRing::generate());
    within(async {
        loop {
            client.visit(&still).await;
            if client.visit(&watching).await == Handshake::Full {
                break;
            }
        }
    })
    .await;
    watch.abort();
}

#[tokio::test]
async fn damaged_key_files_are_refused_at_start_and_ignored_at_reload() {
    let cluster = Cluster::new();
    let edge = cluster.edge(None, config());
    let client = ResumingClient::of(&edge);
    client.visit(&edge).await;
    for name in ["tickets", "tokens", "reset"] {
        let good = fs::read(cluster.path(name)).unwrap();
        for bad in [&[7; 5][..], &vec![0; good.len()], &[&good[..], b"\n"].concat()] {
            fs::write(cluster.path(name), bad).unwrap();
            let error = ClusterKeys::load(cluster.files()).unwrap_err();
            let ClusterKeysError::Damaged { path, .. } = error else { panic!("{error}") };
            assert_eq!(path, cluster.path(name));
            if name != "reset" {
                edge.keys.reload().unwrap_err();
                assert_eq!(edge.keys.reload().unwrap(), KeyReload::Unchanged, "reported once");
            }
        }
        fs::remove_file(cluster.path(name)).unwrap();
        let error = ClusterKeys::load(cluster.files()).unwrap_err();
        assert!(matches!(error, ClusterKeysError::Read { path, .. } if path == cluster.path(name)));
        fs::write(cluster.path(name), good).unwrap();
    }
    assert_eq!(client.visit(&edge).await, Handshake::Resumed);
}

/// RFC 9000 §17.2.5: long header, version 1, packet type 3.
fn is_retry(datagram: &[u8]) -> bool {
    datagram[0] & 0xf0 == 0xf0 && datagram[1..5] == [0, 0, 0, 1]
}

/// Connects a client to `first`, which answers with Retry, and sends the token to `second`. Returns
/// whether `second` accepts the token; else it answers with another Retry.
async fn is_token_accepted(first: &Edge, second: &Edge) -> bool {
    let mut relay = Relay::to(first.harness.addr()).await;
    relay.set_down(false);
    let (dialer, addr) = (first.harness.dialer().with_connect_timeout(MINUTE), relay.addr);
    let connecting = tokio::spawn(async move { dialer.connect(addr, "localhost").await });
    let retry = relay.next_down().await;
    assert!(is_retry(&retry));
    // The client may have sent its first packet more than once.
    relay.set_up(false);
    datagrams_until_probe(&mut relay).await;
    relay.turn_to(second.harness.addr());
    relay.set_up(true);
    relay.set_down(true);
    relay.send_down(&retry).await;
    if is_retry(&relay.next_down().await) {
        connecting.abort();
        return false;
    }
    let connection = within(connecting).await.unwrap().unwrap();
    echo(&connection).await.unwrap();
    true
}

#[tokio::test]
async fn an_address_proved_to_one_edge_is_accepted_by_all() {
    let always = || {
        let mut config = config();
        config.limits.retry_above = 0;
        config
    };
    let cluster = Cluster::new();
    let (one, two) = (cluster.edge(None, always()), cluster.edge(None, always()));
    let other = Cluster::new().edge(None, always());
    assert!(is_token_accepted(&one, &two).await);
    assert!(!is_token_accepted(&one, &other).await);
    cluster.rotate("tokens");
    assert_eq!(two.keys.reload().unwrap(), KeyReload::Changed);
    assert!(is_token_accepted(&one, &two).await, "an old token at an edge with new keys");
    assert!(is_token_accepted(&two, &one).await, "a new token at an edge with old keys");
    cluster.rotate("tokens");
    two.keys.reload().unwrap();
    assert!(!is_token_accepted(&one, &two).await);
}

/// Returns all datagrams that the server sends before it answers a probe. They include every answer
/// to datagrams that the server received before the probe.
///
/// The probe has an unknown version. Every server answers that with Version Negotiation (RFC 9000
/// §6).
async fn datagrams_until_probe(relay: &mut Relay) -> Vec<Vec<u8>> {
    let mut probe = vec![0; 1200];
    probe[..5].copy_from_slice(&[0xc0, 0x0a, 0x1a, 0x2a, 0x3a]);
    probe[5] = 8;
    probe[14] = 8;
    relay.send_up(&probe).await;
    let mut datagrams = Vec::new();
    loop {
        let datagram = relay.next_down().await;
        if datagram[0] & 0x80 != 0 && datagram[1..5] == [0; 4] {
            return datagrams;
        }
        datagrams.push(datagram);
    }
}

async fn echo(
    connection: &Connection,
) -> Result<(u8, bytes::Bytes), qpq_transport::client::CallError> {
    within(connection.call(method::ECHO, vec![7; 64].into(), 1, MINUTE)).await
}

/// Returns the next packet of the client that has a short header and is large enough to be answered
/// with a reset.
async fn short_packet(relay: &mut Relay) -> Vec<u8> {
    loop {
        let datagram = relay.next_up().await;
        if datagram[0] & 0x80 == 0 && datagram.len() > 80 {
            return datagram;
        }
    }
}

/// Returns whether a datagram is a stateless reset: it ends with a token derived from the reset key
/// and the 12 bytes of the connection id (RFC 9000 §10.3).
fn is_reset(datagram: &[u8], incited_by: &[u8]) -> bool {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &RESET_KEY);
    let token = hmac::sign(&key, &incited_by[1..13]);
    datagram.ends_with(&token.as_ref()[..16]) && datagram.len() < incited_by.len()
}

async fn through(edge: &Edge) -> (Relay, Connection) {
    let relay = Relay::to(edge.harness.addr()).await;
    let connection = within(edge.harness.dialer().connect(relay.addr, "localhost")).await.unwrap();
    (relay, connection)
}

#[tokio::test]
async fn a_packet_at_another_edge_does_not_end_its_connection() {
    let cluster = Cluster::new();
    for (own, other) in [(None, None), (Some("one"), Some("two"))] {
        let (own, other) = (cluster.edge(own, config()), cluster.edge(other, config()));
        let (mut relay, connection) = through(&own).await;
        echo(&connection).await.unwrap();
        relay.forget_up();
        relay.turn_to(other.harness.addr());
        let (_, answered) = tokio::join!(
            async {
                let strayed = short_packet(&mut relay).await;
                relay.forget_down();
                relay.send_up(&strayed).await;
                assert_eq!(datagrams_until_probe(&mut relay).await, Vec::<Vec<u8>>::new());
                relay.turn_to(own.harness.addr());
            },
            echo(&connection)
        );
        assert!(answered.is_ok(), "{answered:?}");
        assert_eq!(connection.lost(), None);
    }
}

#[tokio::test]
async fn a_packet_for_an_ended_connection_is_answered_with_a_reset() {
    let cluster = Cluster::new();
    let edge = cluster.edge(None, config());
    let (mut relay, connection) = through(&edge).await;
    let (packet, answered) = tokio::join!(short_packet(&mut relay), echo(&connection));
    answered.unwrap();
    within(connection.close()).await;
    // For some time the server does not answer, or answers with another close.
    within(async {
        loop {
            relay.send_up(&packet).await;
            if datagrams_until_probe(&mut relay).await.iter().any(|sent| is_reset(sent, &packet)) {
                break;
            }
        }
    })
    .await;
    // An id with an invalid MAC is ignored.
    for place in 1..13 {
        let mut damaged = packet.clone();
        damaged[place] ^= 1;
        relay.send_up(&damaged).await;
        assert_eq!(datagrams_until_probe(&mut relay).await, Vec::<Vec<u8>>::new());
    }
}

#[tokio::test]
async fn an_edge_restarted_with_its_name_resets_the_connections_of_its_previous_process() {
    let cluster = Cluster::new();
    let first = cluster.edge(Some("one"), config());
    let (relay, connection) = through(&first).await;
    echo(&connection).await.unwrap();
    let again = cluster.edge(Some("one"), config());
    relay.turn_to(again.harness.addr());
    assert_eq!(echo(&connection).await.unwrap_err(), Lost::Reset.into());
}
