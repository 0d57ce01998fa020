//! The floor of QUIC: a bare quinn server for the same frames, with the same transport settings and
//! kind of certificate, but without sessions, log, limits and dispatch.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use qpq_wire::{Request, Response};
use quinn::{Endpoint, EndpointConfig, TokioRuntime};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// The method of frames that are never answered, as the floor of a waiting FetchWait.
pub(crate) const PARK: u16 = 1;
/// The method of frames that are answered immediately with `reply_bytes` zero bytes.
pub(crate) const ECHO: u16 = 2;

#[derive(clap::Args)]
pub(crate) struct EchoArgs {
    /// The folder with `server-cert.der` and `server-key.der`.
    #[arg(long)]
    identity: std::path::PathBuf,
    /// The size of each answer in bytes.
    #[arg(long)]
    reply_bytes: usize,
}

pub(crate) async fn serve(args: EchoArgs) -> anyhow::Result<()> {
    let certificate = CertificateDer::from(std::fs::read(args.identity.join("server-cert.der"))?);
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(std::fs::read(
        args.identity.join("server-key.der"),
    )?));
    let endpoint = bind(certificate, key)?;
    println!("listening {}", endpoint.local_addr()?);
    let reply = Bytes::from(vec![0; args.reply_bytes]);
    while let Some(incoming) = endpoint.accept().await {
        let reply = reply.clone();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            while let Ok((send, recv)) = connection.accept_bi().await {
                tokio::spawn(answer(send, recv, reply.clone()));
            }
        });
    }
    Ok(())
}

async fn answer(
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
    reply: Bytes,
) -> anyhow::Result<()> {
    let frame = recv.read_to_end(qpq_wire::MAX_PAYLOAD as usize + 10).await?;
    let request = Request::decode(frame.into())?;
    if request.method_id == PARK {
        send.stopped().await?;
        return Ok(());
    }
    let response = Response { status: 0, request_id: request.request_id, payload: reply };
    send.write_chunk(response.encode()?).await?;
    send.finish()?;
    Ok(())
}

/// Binds an endpoint with the default settings of `qpq-server`.
fn bind(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> anyhow::Result<Endpoint> {
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])?
    .with_no_client_auth()
    .with_single_cert(vec![certificate], key)?;
    tls.alpn_protocols = vec![b"qpq".to_vec()];
    tls.send_tls13_tickets = 1;
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(64_u32.into())
        .max_concurrent_uni_streams(0_u32.into())
        .max_idle_timeout(Some(std::time::Duration::from_secs(60).try_into()?))
        .stream_receive_window(131_072_u32.into())
        .receive_window(1_048_576_u32.into())
        .send_window(1 << 20)
        .datagram_receive_buffer_size(None)
        .crypto_buffer_size(16 * 1024)
        .send_fairness(false);
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(
        quinn::crypto::rustls::QuicServerConfig::try_from(tls)?,
    ));
    config.transport_config(Arc::new(transport));
    let socket = std::net::UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    Ok(Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))?)
}
