//! The client's side of the protocol on bare quinn: connections, and calls with one stream each.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use prost::Message as _;
use qpq_proto::{Status, methods::Method};
use qpq_wire::{EventDecoder, EventFrame, Request, Response};
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use sha2::{Digest as _, Sha256};

/// The SHA-256 of the only accepted public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

impl Pin {
    /// Returns the pin of the public key of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let key = ParsedCertificate::try_from(certificate)?.subject_public_key_info();
        Ok(Self(Sha256::digest(key).into()))
    }
}

impl FromStr for Pin {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let bytes = hex::decode(text).context("a pin is hexadecimal")?;
        Ok(Self(bytes.try_into().map_err(|_| anyhow::anyhow!("a pin is 32 bytes"))?))
    }
}

/// A connection. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Connection,
    next_id: Arc<AtomicU32>,
}

/// The answer to a call with a status other than Ok.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub status: u8,
    pub code: String,
    /// The time to wait before a retry; 0 if the answer has none.
    pub retry_after_ms: u32,
    /// The current epoch of the group, if a commit is refused as stale.
    pub epoch: u64,
}

/// The idle timeout of a connection and the interval of its keep-alive packets.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    pub keep_alive: Duration,
    pub idle: Duration,
}

/// The values of a client in production.
impl Default for Silence {
    fn default() -> Self {
        Self { keep_alive: Duration::from_secs(15), idle: Duration::from_secs(60) }
    }
}

/// The address, the timeouts and the flow control of a client.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    /// An address of this machine.
    pub from: IpAddr,
    pub silence: Silence,
    /// The credit of each stream, in bytes; `None` for quinn's default.
    pub stream_credit: Option<u32>,
}

impl Default for Dial {
    fn default() -> Self {
        Self { from: Ipv4Addr::LOCALHOST.into(), silence: Silence::default(), stream_credit: None }
    }
}

/// Creates a UDP socket for any number of connections.
pub fn endpoint(pin: Pin) -> anyhow::Result<Endpoint> {
    endpoint_with(pin, Dial::default())
}

/// Creates a UDP socket for connections with these settings.
pub fn endpoint_with(pin: Pin, dial: Dial) -> anyhow::Result<Endpoint> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin, provider }))
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"qpq".to_vec()];
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_uni_streams(4_u32.into())
        .keep_alive_interval(Some(dial.silence.keep_alive))
        .max_idle_timeout(Some(dial.silence.idle.try_into()?));
    if let Some(credit) = dial.stream_credit {
        transport.stream_receive_window(credit.into());
    }
    let mut config =
        quinn::ClientConfig::new(Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    let mut endpoint = Endpoint::client(SocketAddr::new(dial.from, 0))?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

impl Client {
    pub async fn connect(endpoint: &Endpoint, server: SocketAddr) -> anyhow::Result<Self> {
        let connection = endpoint.connect(server, "localhost")?.await.context("cannot connect")?;
        Ok(Self { connection, next_id: Arc::new(AtomicU32::new(1)) })
    }

    /// Closes the connection. Complete answers can still be read.
    pub fn close(&self) {
        self.connection.close(0_u32.into(), b"");
    }

    /// Returns the reason for the end of the connection, if it has ended.
    pub fn ended(&self) -> Option<ConnectionError> {
        self.connection.close_reason()
    }

    /// Waits for the end of the connection.
    pub async fn closed(&self) -> ConnectionError {
        self.connection.closed().await
    }

    /// Opens a stream, for a client that deviates from the protocol.
    pub async fn open(&self) -> anyhow::Result<(SendStream, RecvStream)> {
        Ok(self.connection.open_bi().await?)
    }

    /// Sends a request frame. Returns its id and the stream of the response.
    pub async fn ask(&self, method_id: u16, payload: Bytes) -> anyhow::Result<(u32, RecvStream)> {
        let request_id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (mut send, recv) = self.open().await?;
        send.write_chunk(Request { method_id, request_id, payload }.encode()?).await?;
        send.finish()?;
        Ok((request_id, recv))
    }

    /// Sends a request frame and receives the response frame.
    pub async fn exchange(&self, method_id: u16, payload: Bytes) -> anyhow::Result<Response> {
        let (request_id, mut recv) = self.ask(method_id, payload).await?;
        let answer = recv.read_to_end(qpq_wire::MAX_PAYLOAD as usize + 9).await?;
        let response = Response::decode(answer.into())?;
        if response.request_id != request_id {
            bail!("the response has another request id");
        }
        Ok(response)
    }

    /// Waits for the next event stream that the server opens.
    pub async fn events(&self) -> anyhow::Result<Events> {
        Ok(Events { stream: self.connection.accept_uni().await?, decoder: EventDecoder::new() })
    }

    /// Calls a method, in the session of `token` if it is given.
    pub async fn call<M: Method>(
        &self,
        request: &M::Request,
        token: Option<&[u8]>,
    ) -> anyhow::Result<Result<M::Response, Refused>> {
        let response = self.exchange(M::INFO.id, encode::<M>(request, token)).await?;
        if response.status == u8::from(Status::Ok) {
            return Ok(Ok(M::Response::decode(response.payload)?));
        }
        let detail = qpq_proto::v1::ErrorDetail::decode(response.payload).unwrap_or_default();
        Ok(Err(Refused {
            status: response.status,
            code: detail.code,
            retry_after_ms: detail.retry_after_ms,
            epoch: detail.epoch,
        }))
    }

    /// Calls a method. An answer other than Ok is an error.
    pub async fn must<M: Method>(
        &self,
        request: &M::Request,
        token: Option<&[u8]>,
    ) -> anyhow::Result<M::Response> {
        match self.call::<M>(request, token).await? {
            Ok(response) => Ok(response),
            Err(Refused { status, code, .. }) => bail!("{} answered {status} {code}", M::INFO.name),
        }
    }
}

/// Serializes a request, in the session of `token` if it is given.
pub fn encode<M: Method>(request: &M::Request, token: Option<&[u8]>) -> Bytes {
    let mut payload = request.encode_to_vec();
    if let Some(token) = token {
        qpq_proto::session::append_session_token(&mut payload, token);
    }
    payload.into()
}

/// A stream of events.
#[derive(Debug)]
pub struct Events {
    stream: RecvStream,
    decoder: EventDecoder,
}

impl Events {
    /// Waits for the next event. Returns `None` at the end of the stream.
    pub async fn next(&mut self) -> anyhow::Result<Option<EventFrame>> {
        loop {
            if let Some(event) = self.decoder.next_event()? {
                return Ok(Some(event));
            }
            match self.stream.read_chunk(usize::MAX, true).await? {
                Some(chunk) => self.decoder.push(&chunk.bytes),
                None => return Ok(None),
            }
        }
    }
}

#[derive(Debug)]
struct Pinned {
    pin: Pin,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Pin::of(end_entity)? == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("the key is not the pinned one".into()))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
