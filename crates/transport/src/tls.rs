//! TLS for QUIC: only version 1.3, one provider, hybrid post-quantum key exchange preferred.

use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{
        NoServerSessionStorage, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
        danger::ClientCertVerifier,
    },
    version::TLS13,
};

use crate::service::Alpn;

/// Returns aws-lc-rs with the permitted key exchanges.
///
/// X25519MLKEM768 protects recorded traffic against a later quantum computer. X25519 and P-256 are
/// for stacks without ML-KEM.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
        aws_lc_rs::kx_group::SECP256R1,
    ];
    Arc::new(provider)
}

/// The parts of a server's side of the handshake.
pub(crate) struct Server<'a> {
    pub(crate) certificates: Arc<dyn ResolvesServerCert>,
    /// The encryption of session tickets; `None` for random keys.
    pub(crate) ticketer: Option<Arc<dyn ProducesTickets>>,
    pub(crate) alpn: &'a [Alpn],
    /// The authorities for the certificates of clients. `None` if clients are not asked for one.
    pub(crate) client_authorities: Option<Arc<RootCertStore>>,
}

/// Returns the server's side of the handshake.
pub(crate) fn server(parts: Server<'_>) -> Result<QuicServerConfig, rustls::Error> {
    QuicServerConfig::try_from(server_tls(parts)?)
        .map_err(|_| rustls::Error::General("the provider lacks TLS13_AES_128_GCM_SHA256".into()))
}

/// Returns the TLS configuration of a server, with 0-RTT off, because a replayed call would take
/// effect twice.
///
/// quinn's own constructor turns 0-RTT on. Stateless tickets also rule it out: rustls accepts early
/// data only with stateful resumption.
fn server_tls(parts: Server<'_>) -> Result<rustls::ServerConfig, rustls::Error> {
    let Server { certificates, ticketer, alpn, client_authorities } = parts;
    let asks_clients = client_authorities.is_some();
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(client_verifier(client_authorities)?)
        .with_cert_resolver(certificates);
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.name().to_vec()).collect();
    config.max_early_data_size = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    if asks_clients {
        // A resumed handshake has the certificate of the first one and does not verify it again,
        // even if it has expired or its authority is no longer trusted.
        config.send_tls13_tickets = 0;
    } else {
        config.send_tls13_tickets = 1;
        config.ticketer = ticketer.map_or_else(aws_lc_rs::Ticketer::new, Ok)?;
    }
    Ok(config)
}

fn client_verifier(
    authorities: Option<Arc<RootCertStore>>,
) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
    match authorities {
        None => Ok(WebPkiClientVerifier::no_client_auth()),
        Some(roots) => WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConnection, NamedGroup, PeerIncompatible, ServerConnection};

    use super::*;
    use crate::certificates::Certificates;

    /// Returns a server's side and its certificate.
    fn serving() -> (ServerConnection, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (directory.path().join("cert"), directory.path().join("key"));
        let certificates =
            Certificates::load_or_create(&cert, &key, &["localhost".to_owned()]).unwrap();
        let parts =
            Server { certificates, ticketer: None, alpn: &Alpn::CLIENTS, client_authorities: None };
        let config = server_tls(parts).unwrap();
        (ServerConnection::new(Arc::new(config)).unwrap(), std::fs::read(cert).unwrap())
    }

    fn key_exchange_with(groups: Vec<&'static dyn rustls::crypto::SupportedKxGroup>) -> NamedGroup {
        let (mut server, certificate) = serving();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.into()).unwrap();
        let offered = CryptoProvider { kx_groups: groups, ..aws_lc_rs::default_provider() };
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(offered))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"qpq".to_vec()];
        let mut client =
            ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut &bytes[..]).unwrap();
            server.process_new_packets().unwrap();
            bytes.clear();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut &bytes[..]).unwrap();
            client.process_new_packets().unwrap();
        }
        server.negotiated_key_exchange_group().unwrap().name()
    }

    #[test]
    fn the_hybrid_key_exchange_is_preferred_and_classic_ones_are_supported() {
        use super::aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
        // Our client and most others send shares for both, and the server chooses.
        assert_eq!(key_exchange_with(vec![X25519MLKEM768, X25519]), NamedGroup::X25519MLKEM768);
        assert_eq!(key_exchange_with(provider().kx_groups.clone()), NamedGroup::X25519MLKEM768);
        assert_eq!(key_exchange_with(vec![X25519, SECP256R1]), NamedGroup::X25519);
        assert_eq!(key_exchange_with(vec![SECP256R1]), NamedGroup::secp256r1);
    }

    #[test]
    fn a_client_with_tls_1_2_is_refused() {
        let hello: &[&[u8]] = &[
            &[3, 3],
            &[7; 32],
            &[0],
            // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression.
            &[0, 2, 0xc0, 0x2b],
            &[1, 0],
            // Extensions: P-256, uncompressed points, ecdsa_secp256r1_sha256.
            &[0, 22],
            &[0, 10, 0, 4, 0, 2, 0, 23],
            &[0, 11, 0, 2, 1, 0],
            &[0, 13, 0, 4, 0, 2, 4, 3],
        ];
        let hello = hello.concat();
        let len = hello.len() as u8;
        let record = [&[22, 3, 1, 0, len + 4, 1, 0, 0, len][..], &hello].concat();
        let (mut server, _) = serving();
        server.read_tls(&mut &record[..]).unwrap();
        let error = server.process_new_packets().unwrap_err();
        let expected = PeerIncompatible::SupportedVersionsExtensionRequired;
        assert_eq!(error, rustls::Error::PeerIncompatible(expected));
    }
}
