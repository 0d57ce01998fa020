//! TLS for QUIC: version 1.3 alone, one provider, hybrid post-quantum key exchange preferred.

use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use rustls::{
    crypto::{CryptoProvider, aws_lc_rs},
    server::ResolvesServerCert,
    version::TLS13,
};

use crate::service::Alpn;

/// aws-lc-rs with the key exchanges that we want: X25519MLKEM768 against whoever records today's traffic for a later
/// quantum computer, X25519 and P-256 for stacks that have no ML-KEM.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
        aws_lc_rs::kx_group::SECP256R1,
    ];
    Arc::new(provider)
}

/// The server's side of the handshake.
///
/// Built by hand, because quinn's own constructor turns 0-RTT on: a replayed call would act twice. Tickets are
/// stateless, so 0-RTT is also out by structure: rustls takes early data only with stateful resumption.
pub(crate) fn server(certificates: Arc<dyn ResolvesServerCert>) -> Result<QuicServerConfig, rustls::Error> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = Alpn::ALL.iter().map(|alpn| alpn.name().to_vec()).collect();
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 1;
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    QuicServerConfig::try_from(config)
        .map_err(|_| rustls::Error::General("the provider lacks TLS13_AES_128_GCM_SHA256".into()))
}
