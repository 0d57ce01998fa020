//! TLS for QUIC: version 1.3 alone, one provider, hybrid post-quantum key exchange preferred.

use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use rustls::{
    crypto::{CryptoProvider, aws_lc_rs},
    server::{ProducesTickets, ResolvesServerCert},
    version::TLS13,
};

use crate::service::Alpn;

/// aws-lc-rs with the key exchanges that we want: X25519MLKEM768 against whoever records today's
/// traffic for a later quantum computer, X25519 and P-256 for stacks that have no ML-KEM.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
        aws_lc_rs::kx_group::SECP256R1,
    ];
    Arc::new(provider)
}

/// The server's side of the handshake. Without a ticketer, the tickets are this process's own.
pub(crate) fn server(
    certificates: Arc<dyn ResolvesServerCert>,
    ticketer: Option<Arc<dyn ProducesTickets>>,
) -> Result<QuicServerConfig, rustls::Error> {
    let ticketer = ticketer.map_or_else(aws_lc_rs::Ticketer::new, Ok)?;
    QuicServerConfig::try_from(server_tls(certificates, ticketer)?)
        .map_err(|_| rustls::Error::General("the provider lacks TLS13_AES_128_GCM_SHA256".into()))
}

/// Built by hand, because quinn's own constructor turns 0-RTT on: a replayed call would act twice.
/// Tickets are stateless, so 0-RTT is also out by structure: rustls takes early data only with
/// stateful resumption.
fn server_tls(
    certificates: Arc<dyn ResolvesServerCert>,
    ticketer: Arc<dyn ProducesTickets>,
) -> Result<rustls::ServerConfig, rustls::Error> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = Alpn::ALL.iter().map(|alpn| alpn.name().to_vec()).collect();
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 1;
    config.ticketer = ticketer;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConnection, NamedGroup, PeerIncompatible, RootCertStore, ServerConnection};

    use super::*;
    use crate::Certificates;

    /// A server's side and the certificate that it shows.
    fn serving() -> (ServerConnection, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (directory.path().join("cert"), directory.path().join("key"));
        let certificates =
            Certificates::load_or_create(&cert, &key, &["localhost".to_owned()]).unwrap();
        let config = server_tls(certificates, aws_lc_rs::Ticketer::new().unwrap()).unwrap();
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
    fn the_hybrid_key_exchange_is_preferred_and_the_classic_ones_are_kept() {
        use super::aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
        // Ours and most others send shares for both, and the server chooses.
        assert_eq!(key_exchange_with(vec![X25519MLKEM768, X25519]), NamedGroup::X25519MLKEM768);
        assert_eq!(key_exchange_with(provider().kx_groups.clone()), NamedGroup::X25519MLKEM768);
        assert_eq!(key_exchange_with(vec![X25519, SECP256R1]), NamedGroup::X25519);
        assert_eq!(key_exchange_with(vec![SECP256R1]), NamedGroup::secp256r1);
    }

    #[test]
    fn a_client_of_tls_1_2_is_turned_away() {
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
