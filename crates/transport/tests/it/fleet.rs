//! Several servers with the same keys, as behind one balancer: what a client got from one is good
//! at another, and none ends a connection of another.

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
    Config, FleetFiles, FleetKeys, FleetKeysError, KeyReload, KeyRing, Member,
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

const RESET_KEY: [u8; 32] = *b"what all edges of the fleet have";
const MINUTE: Duration = Duration::from_secs(60);

/// A directory of keys, and the certificate of the first edge that was started with them.
struct Fleet(TempDir);

impl Fleet {
    fn new() -> Self {
        let fleet = Self(tempfile::tempdir().unwrap());
        fleet.put("tickets", &KeyRing::generate());
        fleet.put("tokens", &KeyRing::generate());
        fs::write(fleet.path("reset"), RESET_KEY).unwrap();
        fleet
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

    fn files(&self) -> FleetFiles {
        let path = |name| self.path(name);
        FleetFiles { tickets: path("tickets"), tokens: path("tokens"), reset: path("reset") }
    }

    /// The keys as the files have them now, for one edge.
    fn keys(&self) -> Arc<FleetKeys> {
        FleetKeys::load(self.files()).unwrap()
    }

    fn edge(&self, name: Option<&str>, config: Config) -> Edge {
        let keys = self.keys();
        let member = Member { keys: Arc::clone(&keys), edge: name.map(Into::into) };
        Edge { keys, harness: Harness::in_fleet(member, config, self.0.path()) }
    }
}

struct Edge {
    keys: Arc<FleetKeys>,
    harness: Harness,
}

/// Counts the certificates that it checks: a resumed session shows none.
#[derive(Debug)]
struct Counting {
    verifier: Arc<WebPkiServerVerifier>,
    checked: AtomicUsize,
}

impl ServerCertVerifier for Counting {
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

/// A client that resumes sessions where it can.
struct Resuming {
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    verifier: Arc<Counting>,
}

#[derive(Debug, PartialEq)]
enum Handshake {
    Full,
    Resumed,
}

impl Resuming {
    /// One that trusts the certificate that this edge and its fleet show.
    fn of(edge: &Edge) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(fs::read(edge.harness.cert_path()).unwrap().into()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
        let verifier = Arc::new(Counting { verifier, checked: AtomicUsize::new(0) });
        let mut tls = raw_tls(&edge.harness);
        tls.dangerous().set_certificate_verifier(Arc::clone(&verifier) as _);
        tls.resumption = Resumption::in_memory_sessions(8);
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        Self { endpoint, config: quinn_config(tls), verifier }
    }

    /// Connects, makes a call, by whose answer a ticket has come, and leaves.
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
async fn a_ticket_of_one_edge_is_good_at_another_with_the_same_keys_and_at_no_other() {
    let fleet = Fleet::new();
    let (one, two) = (fleet.edge(None, config()), fleet.edge(None, config()));
    let stranger = {
        let other = Fleet::new();
        for name in ["cert.der", "key.der"] {
            fs::copy(fleet.path(name), other.path(name)).unwrap();
        }
        other.edge(None, config())
    };
    let client = Resuming::of(&one);
    assert_eq!(client.visit(&one).await, Handshake::Full);
    assert_eq!(client.visit(&two).await, Handshake::Resumed);
    assert_eq!(client.visit(&one).await, Handshake::Resumed);
    assert_eq!(client.visit(&stranger).await, Handshake::Full);
    assert_eq!(client.visit(&two).await, Handshake::Full, "the last ticket was the stranger's");
}

#[tokio::test]
async fn tickets_outlive_a_rotation_on_both_sides_of_it_until_their_key_is_dropped() {
    let fleet = Fleet::new();
    let (slow, quick) = (fleet.edge(None, config()), fleet.edge(None, config()));
    let client = Resuming::of(&slow);
    assert_eq!(client.visit(&slow).await, Handshake::Full);
    fleet.rotate("tickets");
    assert_eq!(quick.keys.reload().unwrap(), KeyReload::Changed);
    assert_eq!(quick.keys.reload().unwrap(), KeyReload::Unchanged);
    assert_eq!(client.visit(&quick).await, Handshake::Resumed);
    // A ticket made with the new key, at an edge that has not looked at the files yet.
    assert_eq!(client.visit(&slow).await, Handshake::Resumed);
    // And one made with the old key, at an edge that has forgotten it.
    fleet.rotate("tickets");
    quick.keys.reload().unwrap();
    assert_eq!(client.visit(&quick).await, Handshake::Full);
}

#[tokio::test]
async fn the_watch_finds_new_keys_by_itself() {
    let fleet = Fleet::new();
    let (still, watching) = (fleet.edge(None, config()), fleet.edge(None, config()));
    let client = Resuming::of(&still);
    client.visit(&still).await;
    assert_eq!(client.visit(&watching).await, Handshake::Resumed);
    let watch = tokio::spawn(Arc::clone(&watching.keys).watch(Duration::from_millis(5)));
    fleet.put("tickets", &KeyRing::generate());
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
async fn damaged_files_are_refused_at_the_start_and_change_nothing_later() {
    let fleet = Fleet::new();
    let edge = fleet.edge(None, config());
    let client = Resuming::of(&edge);
    client.visit(&edge).await;
    for name in ["tickets", "tokens", "reset"] {
        let good = fs::read(fleet.path(name)).unwrap();
        for bad in [&[7; 5][..], &vec![0; good.len()], &[&good[..], b"\n"].concat()] {
            fs::write(fleet.path(name), bad).unwrap();
            let error = FleetKeys::load(fleet.files()).unwrap_err();
            assert!(
                matches!(error, FleetKeysError::Damaged { path, .. } if path == fleet.path(name))
            );
            if name != "reset" {
                edge.keys.reload().unwrap_err();
                assert_eq!(edge.keys.reload().unwrap(), KeyReload::Unchanged, "complained of once");
            }
        }
        fs::remove_file(fleet.path(name)).unwrap();
        let error = FleetKeys::load(fleet.files()).unwrap_err();
        assert!(matches!(error, FleetKeysError::Read { path, .. } if path == fleet.path(name)));
        fs::write(fleet.path(name), good).unwrap();
    }
    assert_eq!(client.visit(&edge).await, Handshake::Resumed);
}

/// RFC 9000 §17.2.5: long header, version 1, packet type 3.
fn is_retry(datagram: &[u8]) -> bool {
    datagram[0] & 0xf0 == 0xf0 && datagram[1..5] == [0, 0, 0, 1]
}

/// Has a client connect to `first`, which asks for its address, and takes its answer to `second`:
/// whether that believes it and serves the client, or asks again.
async fn believed(first: &Edge, second: &Edge) -> bool {
    let mut relay = Relay::to(first.harness.addr()).await;
    relay.set_down(false);
    let (dialer, addr) = (first.harness.dialer().with_connect_timeout(MINUTE), relay.addr);
    let connecting = tokio::spawn(async move { dialer.connect(addr, "localhost").await });
    let retry = relay.next_down().await;
    assert!(is_retry(&retry));
    // The client may have sent its first packet more than once.
    relay.set_up(false);
    nothing_more_from(&mut relay).await;
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
async fn an_address_proved_to_one_edge_is_proved_to_all() {
    let always = || {
        let mut config = config();
        config.limits.retry_above = 0;
        config
    };
    let fleet = Fleet::new();
    let (one, two) = (fleet.edge(None, always()), fleet.edge(None, always()));
    let stranger = Fleet::new().edge(None, always());
    assert!(believed(&one, &two).await);
    assert!(!believed(&one, &stranger).await);
    fleet.rotate("tokens");
    assert_eq!(two.keys.reload().unwrap(), KeyReload::Changed);
    assert!(believed(&one, &two).await, "an old token at an edge with new keys");
    assert!(believed(&two, &one).await, "a new token at an edge with old keys");
    fleet.rotate("tokens");
    two.keys.reload().unwrap();
    assert!(!believed(&one, &two).await);
}

/// Has the server say something that it says to everybody, so that whatever it had to say before
/// has been said; that it said. RFC 9000 §6: a version that nobody speaks is answered with those
/// that are spoken.
async fn nothing_more_from(relay: &mut Relay) -> Vec<Vec<u8>> {
    let mut unspoken = vec![0; 1200];
    unspoken[..5].copy_from_slice(&[0xc0, 0x0a, 0x1a, 0x2a, 0x3a]);
    unspoken[5] = 8;
    unspoken[14] = 8;
    relay.send_up(&unspoken).await;
    let mut said = Vec::new();
    loop {
        let datagram = relay.next_down().await;
        if datagram[0] & 0x80 != 0 && datagram[1..5] == [0; 4] {
            return said;
        }
        said.push(datagram);
    }
}

async fn echo(
    connection: &Connection,
) -> Result<(u8, bytes::Bytes), qpq_transport::client::CallError> {
    within(connection.call(method::ECHO, vec![7; 64].into(), 1, MINUTE)).await
}

/// The next packet of the client with a short header, large enough to be answered with a reset.
async fn short_packet(relay: &mut Relay) -> Vec<u8> {
    loop {
        let datagram = relay.next_up().await;
        if datagram[0] & 0x80 == 0 && datagram.len() > 80 {
            return datagram;
        }
    }
}

/// RFC 9000 §10.3: a reset ends with a token that only the key's owner can make, here from the 12
/// bytes of our ids.
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
async fn a_packet_that_strays_to_another_edge_ends_nothing() {
    let fleet = Fleet::new();
    for (own, other) in [(None, None), (Some("one"), Some("two"))] {
        let (own, other) = (fleet.edge(own, config()), fleet.edge(other, config()));
        let (mut relay, connection) = through(&own).await;
        echo(&connection).await.unwrap();
        relay.forget_up();
        relay.turn_to(other.harness.addr());
        let (_, answered) = tokio::join!(
            async {
                let strayed = short_packet(&mut relay).await;
                relay.forget_down();
                relay.send_up(&strayed).await;
                assert_eq!(nothing_more_from(&mut relay).await, Vec::<Vec<u8>>::new());
                relay.turn_to(own.harness.addr());
            },
            echo(&connection)
        );
        assert!(answered.is_ok(), "{answered:?}");
        assert_eq!(connection.lost(), None);
    }
}

#[tokio::test]
async fn a_packet_for_an_own_connection_that_is_gone_is_answered_with_a_reset() {
    let fleet = Fleet::new();
    let edge = fleet.edge(None, config());
    let (mut relay, connection) = through(&edge).await;
    let (packet, answered) = tokio::join!(short_packet(&mut relay), echo(&connection));
    answered.unwrap();
    within(connection.close()).await;
    // Until the server has forgotten it, it answers nothing or that it is closed.
    within(async {
        loop {
            relay.send_up(&packet).await;
            if nothing_more_from(&mut relay).await.iter().any(|said| is_reset(said, &packet)) {
                break;
            }
        }
    })
    .await;
    // Damaged, it is nobody's.
    for place in 1..13 {
        let mut damaged = packet.clone();
        damaged[place] ^= 1;
        relay.send_up(&damaged).await;
        assert_eq!(nothing_more_from(&mut relay).await, Vec::<Vec<u8>>::new());
    }
}

#[tokio::test]
async fn an_edge_that_is_back_under_its_name_tells_the_clients_of_its_predecessor() {
    let fleet = Fleet::new();
    let first = fleet.edge(Some("one"), config());
    let (relay, connection) = through(&first).await;
    echo(&connection).await.unwrap();
    let again = fleet.edge(Some("one"), config());
    relay.turn_to(again.harness.addr());
    assert_eq!(echo(&connection).await.unwrap_err(), Lost::Reset.into());
}
