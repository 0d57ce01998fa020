//! Listeners that require certificates of clients, as the federation's does.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use qpq_transport::{
    Alpn, BindError, Certificates, ClientAuth, Identity, Peer, Server,
    client::{CallError, Dialer},
};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::client::Resumption;
use tempfile::TempDir;

use crate::{
    certificates::Tickets,
    support::{Harness, Report, config, frame, method, quinn_config, raw_tls, within},
};

const MINUTE: Duration = Duration::from_secs(60);

/// A certificate authority with its files.
struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(directory.path().join("ca.der"), certificate.der()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("ca.der")
    }

    /// Issues a certificate for `name`, with parameters that `change` may change.
    fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Arc<Identity> {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let pair = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&pair, &self.issuer).unwrap();
        let [cert, key] = ["cert.der", "key.der"].map(|name| self.directory.path().join(name));
        fs::write(&cert, certificate.der()).unwrap();
        fs::write(&key, pair.serialize_der()).unwrap();
        Arc::new(Identity::load(&cert, &key).unwrap())
    }

    /// Starts a listener that trusts this authority.
    fn listener(&self) -> Harness {
        let mut config = config();
        config.alpn = vec![Alpn::Federation];
        config.client_auth = ClientAuth::Required { authorities: self.path() };
        Harness::with(config)
    }
}

fn dialer(harness: &Harness) -> Dialer {
    harness.dialer().with_alpn(Alpn::Federation.name().to_vec())
}

/// Connects and makes a call. With TLS 1.3 the client's handshake ends before the server has
/// verified the client's certificate, so a refusal fails the call and not the connection attempt.
async fn is_served(harness: &Harness, dialer: &Dialer) -> bool {
    let Ok(connection) = within(dialer.connect(harness.addr(), "localhost")).await else {
        return false;
    };
    match within(connection.call(method::ECHO, "in".into(), 1, MINUTE)).await {
        Ok((_, payload)) => {
            assert_eq!(payload, "in");
            true
        }
        Err(CallError::Lost(_)) => false,
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn the_service_receives_the_verified_certificate() {
    let authority = Authority::new();
    let mut harness = authority.listener();
    let identity = authority.issue("b.example", |_| {});
    let dialer = dialer(&harness).with_identity(Arc::clone(&identity));
    assert!(is_served(&harness, &dialer).await);
    let Report::Connected(Peer { alpn, certificate, .. }) = harness.next_report().await else {
        panic!("the first report is that of the connection")
    };
    assert_eq!(alpn, Alpn::Federation);
    let certificate = certificate.unwrap();
    assert_eq!(certificate.fingerprint(), identity.fingerprint());
    assert_eq!(certificate.der(), fs::read(authority.directory.path().join("cert.der")).unwrap());
    assert_eq!(certificate.dns_names(), ["b.example"]);
    assert!(certificate.is_valid_for("B.example"));
    assert!(!certificate.is_valid_for("a.example"));
    assert!(!certificate.is_valid_for("not a name"));
}

#[tokio::test]
async fn clients_without_a_valid_certificate_are_refused() {
    let authority = Authority::new();
    let mut harness = authority.listener();
    let unknown = Authority::new().issue("b.example", |_| {});
    let expired = authority.issue("b.example", |params| {
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    });
    let for_servers_only = authority.issue("b.example", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let self_signed = {
        let directory = tempfile::tempdir().unwrap();
        let [cert, key] = ["cert.der", "key.der"].map(|name| directory.path().join(name));
        Arc::new(Identity::load_or_create(&cert, &key, &["b.example".to_owned()]).unwrap())
    };
    for identity in [unknown, expired, for_servers_only, self_signed] {
        let dialer = dialer(&harness).with_identity(Arc::clone(&identity));
        assert!(!is_served(&harness, &dialer).await, "{identity:?}");
    }
    assert!(!is_served(&harness, &dialer(&harness)).await, "no certificate");
    assert_eq!(harness.reported(), [], "no connection reaches the service");
}

#[tokio::test]
async fn a_listener_that_requires_certificates_issues_no_session_tickets() {
    let authority = Authority::new();
    let harness = authority.listener();
    let tickets = Arc::new(Tickets::default());
    authority.issue("b.example", |_| {});
    let read = |name| fs::read(authority.directory.path().join(name)).unwrap();
    let (cert, key) = (read("cert.der"), read("key.der"));
    let mut tls = raw_tls(&harness);
    tls.client_auth_cert_resolver = {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let key = key.try_into().unwrap();
        let certified =
            rustls::sign::CertifiedKey::from_der(vec![cert.into()], key, &provider).unwrap();
        Arc::new(rustls::sign::SingleCertAndKey::from(certified))
    };
    tls.alpn_protocols = vec![Alpn::Federation.name().to_vec()];
    tls.resumption = Resumption::store(Arc::clone(&tickets) as _);
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(quinn_config(tls), harness.addr(), "localhost").unwrap();
    let connection = within(connecting).await.unwrap();
    let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
    send.write_all(&frame(method::ECHO, 1, b"")).await.unwrap();
    send.finish().unwrap();
    within(recv.read_to_end(100)).await.unwrap();
    assert_eq!(tickets.received(), 0);
}

#[tokio::test]
async fn a_listener_for_clients_asks_for_no_certificate() {
    let mut harness = Harness::start();
    let identity = Authority::new().issue("b.example", |_| {});
    let dialer = harness.dialer().with_identity(identity);
    assert!(is_served(&harness, &dialer).await);
    let Report::Connected(peer) = harness.next_report().await else {
        panic!("the first report is that of the connection")
    };
    assert_eq!(peer.certificate, None);
    let federation = harness.dialer().with_alpn(Alpn::Federation.name().to_vec());
    assert!(!is_served(&harness, &federation).await, "another protocol");
}

#[tokio::test]
async fn the_error_about_unreadable_authorities_contains_their_path() {
    let harness = Harness::start();
    let path = harness.directory.path().join("absent");
    let mut config = config();
    config.client_auth = ClientAuth::Required { authorities: path.clone() };
    let certificates: Arc<Certificates> = Arc::clone(&harness.certificates);
    let error = Server::bind(config, certificates, Arc::clone(&harness.probe)).unwrap_err();
    let BindError::Authorities { path: named, .. } = error else { panic!("{error}") };
    assert_eq!(named, path);
}
