//! TLS from the side of a client: trust, protocols, resumption and certificate reloads.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use qpq_transport::{
    Fingerprint, Identity, IdentityError, Reload,
    client::{ConnectError, Dialer, Trust, TrustError},
};
use rustls::{
    NamedGroup,
    client::Tls13ClientSessionValue,
    client::{ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue},
    pki_types::ServerName,
};

use crate::support::{Harness, frame, method, quinn_config, raw_tls, within};

async fn dial(harness: &Harness, trust: Trust, name: &str) -> Result<Fingerprint, ConnectError> {
    let dialer = Dialer::new(trust).unwrap();
    within(dialer.connect(harness.addr(), name)).await.map(|connection| connection.fingerprint())
}

#[tokio::test]
async fn a_pin_accepts_its_server_and_no_other() {
    let harness = Harness::start();
    let own = harness.certificates.fingerprint();
    // Name and dates of the certificate are ignored.
    assert_eq!(dial(&harness, Trust::Pin(own), "another.example").await.unwrap(), own);
    let expected = Fingerprint::from([7; 32]);
    match dial(&harness, Trust::Pin(expected), "localhost").await.unwrap_err() {
        ConnectError::PinMismatch { expected: pinned, seen } => {
            assert_eq!((pinned, seen), (expected, own))
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_pin_of_the_key_stays_valid_after_renewal_and_a_pin_of_the_certificate_does_not() {
    let harness = Harness::start();
    let own = harness.certificates.fingerprint();
    let of_certificate = Fingerprint::of_certificate(&fs::read(harness.cert_path()).unwrap());
    assert_eq!(dial(&harness, Trust::Pin(of_certificate), "localhost").await.unwrap(), own);

    let key = harness.directory.path().join("key.der");
    let pair = rcgen::KeyPair::try_from(fs::read(key).unwrap()).unwrap();
    let renewed = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    fs::write(harness.cert_path(), renewed.self_signed(&pair).unwrap().der()).unwrap();
    assert_eq!(harness.certificates.reload().unwrap(), Reload::Changed(own));
    assert_eq!(dial(&harness, Trust::Pin(own), "localhost").await.unwrap(), own);
    let refused = dial(&harness, Trust::Pin(of_certificate), "localhost").await;
    assert!(matches!(refused, Err(ConnectError::PinMismatch { .. })), "{refused:?}");
}

#[tokio::test]
async fn either_of_two_pins_is_accepted_while_a_key_is_replaced() {
    let harness = Harness::start();
    let old = harness.certificates.fingerprint();
    let next = replace(&harness, &["cert.der", "key.der"]);
    let both = || Trust::PinEither([old, next]);
    assert_eq!(dial(&harness, both(), "localhost").await.unwrap(), old);
    assert_eq!(harness.certificates.reload().unwrap(), Reload::Changed(next));
    assert_eq!(dial(&harness, both(), "localhost").await.unwrap(), next);
    let neither = Trust::PinEither([old, Fingerprint::from([7; 32])]);
    match dial(&harness, neither, "localhost").await.unwrap_err() {
        ConnectError::PinMismatch { expected, seen } => assert_eq!((expected, seen), (old, next)),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn first_use_returns_the_fingerprint_to_pin() {
    let harness = Harness::start();
    let seen = dial(&harness, Trust::FirstUse, "localhost").await.unwrap();
    assert_eq!(Some(seen), Fingerprint::of_key(&fs::read(harness.cert_path()).unwrap()));
}

#[tokio::test]
async fn an_authority_certifies_the_name() {
    let harness = Harness::start();
    let own = harness.certificates.fingerprint();
    let authority = Trust::CaFile(harness.cert_path());
    for name in ["localhost", "127.0.0.1"] {
        assert_eq!(dial(&harness, authority.clone(), name).await.unwrap(), own);
    }
    let wrong_name = dial(&harness, authority, "another.example").await;
    assert!(matches!(wrong_name, Err(ConnectError::Untrusted(_))), "{wrong_name:?}");
    let other = Harness::start();
    let wrong_authority = dial(&harness, Trust::CaFile(other.cert_path()), "localhost").await;
    assert!(matches!(wrong_authority, Err(ConnectError::Untrusted(_))), "{wrong_authority:?}");
}

#[tokio::test]
async fn an_authority_file_without_a_certificate_is_refused() {
    let harness = Harness::start();
    for path in [harness.directory.path().join("absent"), harness.directory.path().join("key.der")]
    {
        let error = Dialer::new(Trust::CaFile(path)).unwrap_err();
        assert!(matches!(error, TrustError::CaFile { .. }), "{error}");
    }
}

#[tokio::test]
async fn another_protocol_is_refused() {
    let harness = Harness::start();
    let dialer = harness.dialer().with_alpn(b"h3".to_vec());
    let refused = within(dialer.connect(harness.addr(), "localhost")).await;
    assert!(matches!(refused, Err(ConnectError::WrongProtocol)), "{refused:?}");
    // A client without ALPN is refused too.
    let mut tls = raw_tls(&harness);
    tls.alpn_protocols.clear();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(quinn_config(tls), harness.addr(), "localhost").unwrap();
    match within(connecting).await.unwrap_err() {
        quinn::ConnectionError::ConnectionClosed(close) => {
            assert_eq!(u64::from(close.error_code), 0x178)
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn each_key_exchange_succeeds_as_the_only_one_offered() {
    let harness = Harness::start();
    for group in [NamedGroup::X25519MLKEM768, NamedGroup::X25519, NamedGroup::secp256r1] {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.kx_groups.retain(|offered| offered.name() == group);
        assert_eq!(provider.kx_groups.len(), 1);
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(
            {
                let mut roots = rustls::RootCertStore::empty();
                roots.add(fs::read(harness.cert_path()).unwrap().into()).unwrap();
                Arc::new(roots)
            },
            Arc::new(provider.clone()),
        );
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_webpki_verifier(verifier.build().unwrap())
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"qpq".to_vec()];
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connecting =
            endpoint.connect_with(quinn_config(tls), harness.addr(), "localhost").unwrap();
        within(connecting).await.unwrap();
    }
}

/// Counts received and used tickets.
#[derive(Debug)]
pub(crate) struct Tickets {
    store: ClientSessionMemoryCache,
    received: AtomicUsize,
    used: AtomicUsize,
}

impl Default for Tickets {
    fn default() -> Self {
        Self {
            store: ClientSessionMemoryCache::new(8),
            received: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
        }
    }
}

impl Tickets {
    pub(crate) fn received(&self) -> usize {
        self.received.load(Ordering::SeqCst)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, server_name: ServerName<'static>, group: NamedGroup) {
        self.store.set_kx_hint(server_name, group);
    }

    fn kx_hint(&self, server_name: &ServerName<'_>) -> Option<NamedGroup> {
        self.store.kx_hint(server_name)
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {
        panic!("TLS 1.2");
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(
        &self,
        server_name: ServerName<'static>,
        value: Tls13ClientSessionValue,
    ) {
        self.received.fetch_add(1, Ordering::SeqCst);
        self.store.insert_tls13_ticket(server_name, value);
    }

    fn take_tls13_ticket(
        &self,
        server_name: &ServerName<'static>,
    ) -> Option<Tls13ClientSessionValue> {
        let ticket = self.store.take_tls13_ticket(server_name);
        self.used.fetch_add(usize::from(ticket.is_some()), Ordering::SeqCst);
        ticket
    }
}

#[tokio::test]
async fn a_resumed_connection_has_no_early_data() {
    let harness = Harness::start();
    let tickets = Arc::new(Tickets::default());
    let mut tls = raw_tls(&harness);
    tls.resumption = Resumption::store(Arc::clone(&tickets) as _);
    tls.enable_early_data = true;
    let config = quinn_config(tls);
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connect = || endpoint.connect_with(config.clone(), harness.addr(), "localhost").unwrap();
    let first = within(connect()).await.unwrap();
    // The ticket arrives before the first answer.
    let (mut send, mut recv) = first.open_bi().await.unwrap();
    send.write_all(&frame(method::ECHO, 1, b"")).await.unwrap();
    send.finish().unwrap();
    within(recv.read_to_end(100)).await.unwrap();
    assert_eq!((tickets.received(), tickets.used.load(Ordering::SeqCst)), (1, 0));
    let Err(second) = connect().into_0rtt() else { panic!("the ticket allows early data") };
    within(second).await.unwrap();
    assert_eq!(tickets.used.load(Ordering::SeqCst), 1);
}

/// Replaces files of the harness with those of another identity.
fn replace(harness: &Harness, parts: &[&str]) -> Fingerprint {
    let other = tempfile::tempdir().unwrap();
    let path = |name: &str| other.path().join(name);
    let made =
        Identity::load_or_create(&path("cert.der"), &path("key.der"), &["localhost".to_owned()]);
    for part in parts {
        fs::rename(path(part), harness.directory.path().join(part)).unwrap();
    }
    made.unwrap().fingerprint()
}

#[tokio::test]
async fn a_changed_certificate_is_used_for_new_connections_and_open_ones_continue() {
    let harness = Harness::start();
    let old = harness.certificates.fingerprint();
    let connection = harness.connect().await;
    assert_eq!(harness.certificates.reload().unwrap(), Reload::Unchanged);
    let new = replace(&harness, &["cert.der", "key.der"]);
    assert_eq!(harness.certificates.reload().unwrap(), Reload::Changed(new));
    assert_ne!(old, new);
    assert_eq!(dial(&harness, Trust::FirstUse, "localhost").await.unwrap(), new);
    let call = connection.call(method::ECHO, "on".into(), 1, Duration::from_secs(60));
    assert_eq!(within(call).await.unwrap().1, "on");
}

#[tokio::test]
async fn files_that_do_not_belong_together_are_not_loaded() {
    let harness = Harness::start();
    let old = harness.certificates.fingerprint();
    replace(&harness, &["cert.der"]);
    let error = harness.certificates.reload().unwrap_err();
    assert!(matches!(error, IdentityError::Unusable { .. }), "{error}");
    // The same files are reported once.
    assert_eq!(harness.certificates.reload().unwrap(), Reload::Unchanged);
    assert_eq!(dial(&harness, Trust::FirstUse, "localhost").await.unwrap(), old);
    fs::remove_file(harness.cert_path()).unwrap();
    assert!(matches!(harness.certificates.reload(), Err(IdentityError::Read { .. })));
    assert_eq!(dial(&harness, Trust::FirstUse, "localhost").await.unwrap(), old);
    let new = replace(&harness, &["cert.der", "key.der"]);
    assert_eq!(harness.certificates.reload().unwrap(), Reload::Changed(new));
}

#[tokio::test]
async fn the_watch_reloads_changed_files() {
    let harness = Harness::start();
    let watch = tokio::spawn(Arc::clone(&harness.certificates).watch(Duration::from_millis(5)));
    let new = replace(&harness, &["cert.der", "key.der"]);
    within(async {
        while harness.certificates.fingerprint() != new {
            dial(&harness, Trust::FirstUse, "localhost").await.unwrap();
        }
    })
    .await;
    watch.abort();
}
