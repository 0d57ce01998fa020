//! A connection to a server: calls, each on its own stream, and the server's events.

use std::{fmt, net::SocketAddr, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, stream};
use qpq_wire::{EventDecoder, MAX_PAYLOAD, Request, ResponseHeader};
use quinn::{Endpoint, RecvStream, SendStream, VarInt, WriteError};
use tokio::time::timeout;

use super::error::{CallError, Lost};
use crate::fingerprint::Fingerprint;

/// The code of all resets, which has no meaning.
const NO_CODE: VarInt = VarInt::from_u32(0);

/// The maximum memory that is reserved for a response before its first byte arrives, in bytes.
const FIRST_CHUNK: usize = 64 * 1024;

/// The maximum number of bytes of events that are read in one step.
const EVENT_CHUNK: usize = 64 * 1024;

/// A connection to a server. Cheap to clone. Closes when the last clone is dropped.
#[derive(Clone)]
pub struct Connection {
    quic: quinn::Connection,
    endpoint: Endpoint,
    fingerprint: Fingerprint,
}

impl Connection {
    pub(super) fn new(
        endpoint: Endpoint,
        quic: quinn::Connection,
        fingerprint: Fingerprint,
    ) -> Self {
        Self { quic, endpoint, fingerprint }
    }

    /// Returns the fingerprint of the server's key.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Calls a method and returns the status and the payload of the response. Dropping the future
    /// cancels the call on both sides.
    ///
    /// # Errors
    /// [`CallError`]. A response with another status than Ok is not an error here.
    pub async fn call(
        &self,
        method_id: u16,
        payload: Bytes,
        request_id: u32,
        deadline: Duration,
    ) -> Result<(u8, Bytes), CallError> {
        let request = Request { method_id, request_id, payload };
        timeout(deadline, self.exchange(request)).await.unwrap_or(Err(CallError::TimedOut))
    }

    async fn exchange(&self, request: Request) -> Result<(u8, Bytes), CallError> {
        let header = request.header().map_err(CallError::TooLarge)?;
        let (send, mut recv) = self.quic.open_bi().await?;
        // The drop of `recv` asks the server to stop. The drop of `send` would end an incomplete
        // request cleanly, so `RequestStream` resets it.
        let mut request_stream = RequestStream { send };
        let mut frame = [Bytes::copy_from_slice(&header.encode()), request.payload];
        match request_stream.send.write_all_chunks(&mut frame).await {
            // The server has already answered and refuses the rest.
            Ok(()) | Err(WriteError::Stopped(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = request_stream.send.finish();
        read_response(&mut recv, header.request_id).await
    }

    /// Returns the server's events as type and payload. All events arrive on one stream, which the
    /// server opens with the first event. The returned stream ends with an error when the
    /// connection ends.
    pub fn events(&self) -> impl Stream<Item = Result<(u16, Bytes), CallError>> + Send + use<> {
        let events = Events { quic: self.quic.clone(), recv: None, decoder: EventDecoder::new() };
        stream::try_unfold(events, |mut events| async {
            Ok(events.next().await?.map(|event| (event, events)))
        })
    }

    /// Waits until the connection has ended, and returns the reason.
    pub async fn closed(&self) -> Lost {
        self.quic.closed().await.into()
    }

    /// Returns the reason why the connection ended, or `None` while it is open.
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        self.quic.close_reason().map(Into::into)
    }

    /// Closes the connection, and waits until the server has been notified or cannot be reached.
    pub async fn close(&self) {
        self.quic.close(NO_CODE, b"");
        self.endpoint.wait_idle().await;
    }

    /// Returns the address of the server.
    #[must_use]
    pub fn remote_addr(&self) -> SocketAddr {
        self.quic.remote_address()
    }

    /// Returns the current estimate of the round-trip time.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.quic.rtt()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("remote_addr", &self.remote_addr())
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// The request half of a stream. Its drop resets an incomplete request, which quinn would end
/// cleanly.
struct RequestStream {
    send: SendStream,
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        // Has no effect once the server has received everything.
        let _ = self.send.reset(NO_CODE);
    }
}

async fn read_response(recv: &mut RecvStream, request_id: u32) -> Result<(u8, Bytes), CallError> {
    let mut header = [0; ResponseHeader::LEN];
    read_exact(recv, &mut header).await?;
    let header = ResponseHeader::decode(&header);
    header.check().map_err(CallError::TooLarge)?;
    if header.request_id != request_id {
        return Err(CallError::Malformed("it belongs to another request"));
    }
    let len = header.payload_len as usize;
    let mut payload = Vec::with_capacity(len.min(FIRST_CHUNK));
    while let Some(chunk) = recv.read_chunk(MAX_PAYLOAD as usize, true).await? {
        if chunk.bytes.len() > len - payload.len() {
            return Err(CallError::Malformed("bytes follow the frame"));
        }
        payload.extend_from_slice(&chunk.bytes);
    }
    if payload.len() < len {
        return Err(CallError::Malformed("it ends inside the frame"));
    }
    Ok((header.status, payload.into()))
}

async fn read_exact(recv: &mut RecvStream, bytes: &mut [u8]) -> Result<(), CallError> {
    recv.read_exact(bytes).await.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => {
            CallError::Malformed("it ends inside the header")
        }
        quinn::ReadExactError::ReadError(error) => error.into(),
    })
}

struct Events {
    quic: quinn::Connection,
    recv: Option<RecvStream>,
    decoder: EventDecoder,
}

impl Events {
    /// Returns the next event, or `None` when the server has ended the stream.
    async fn next(&mut self) -> Result<Option<(u16, Bytes)>, CallError> {
        let recv = match &mut self.recv {
            Some(recv) => recv,
            None => self.recv.insert(self.quic.accept_uni().await?),
        };
        loop {
            if let Some(event) = self.decoder.next_event().map_err(CallError::TooLarge)? {
                return Ok(Some((event.event_type, event.payload)));
            }
            match recv.read_chunk(EVENT_CHUNK, true).await? {
                Some(chunk) => self.decoder.push(&chunk.bytes),
                None => {
                    std::mem::take(&mut self.decoder)
                        .finish()
                        .map_err(|_| CallError::Malformed("the events end inside a frame"))?;
                    return Ok(None);
                }
            }
        }
    }
}
