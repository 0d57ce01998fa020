//! Reading one request, at the memory cost of the bytes that have arrived, within the limits of the
//! memory for requests.

use std::ops::ControlFlow;

use bytes::Bytes;
use qpq_wire::{Refusal, Request, RequestHeader};
use quinn::{ReadError, RecvStream};
use tokio::time::timeout;

use super::refuse;
use crate::{
    context::ConnectionContext,
    request_memory::{Reservation, UNCOUNTED},
    service::{Reply, Service},
};

/// The maximum memory that is reserved for a payload before its first byte arrives, in bytes. After
/// that, a buffer is at most twice as large as the bytes that have arrived.
const FIRST_CHUNK: usize = UNCOUNTED;

/// The outcome of reading a request.
pub(super) enum Received {
    Request(Request),
    /// The request is refused with this reply.
    Refused(Reply),
    /// The client reset the stream, or the connection ended.
    Cancelled,
}

/// The request half of a stream.
pub(super) struct RequestStream {
    recv: RecvStream,
    /// Bytes that were read and not yet used.
    rest: Bytes,
    header: Option<RequestHeader>,
}

/// The reason why reading ended early.
enum Stop {
    Refused(Refusal),
    NotAdmitted(Reply),
    Cancelled,
}

impl From<Refusal> for Stop {
    fn from(why: Refusal) -> Self {
        Self::Refused(why)
    }
}

impl From<ReadError> for Stop {
    fn from(_: ReadError) -> Self {
        Self::Cancelled
    }
}

/// Reads a request, and asks the service to admit it by its header.
pub(super) async fn receive<S: Service>(
    connection: &ConnectionContext<S>,
    stream: &mut RequestStream,
    memory: &mut Reservation<'_>,
) -> Received {
    // The time limit starts with the first byte. A stream may be open long before, if the client
    // has used a later one first.
    let read = match stream.fill().await {
        Err(_) => return Received::Cancelled,
        Ok(ControlFlow::Break(())) => Err(Stop::Refused(Refusal::Malformed)),
        Ok(ControlFlow::Continue(())) => {
            let limit = connection.server.timeouts.request;
            match timeout(limit, read_request(connection, stream, memory)).await {
                Ok(read) => read,
                Err(_) => Err(Stop::Refused(Refusal::Timeout)),
            }
        }
    };
    match read {
        Ok(request) => Received::Request(request),
        Err(Stop::Refused(why)) => {
            Received::Refused(refuse(connection, stream.header.as_ref(), why))
        }
        Err(Stop::NotAdmitted(reply)) => Received::Refused(reply),
        Err(Stop::Cancelled) => Received::Cancelled,
    }
}

async fn read_request<S: Service>(
    connection: &ConnectionContext<S>,
    stream: &mut RequestStream,
    memory: &mut Reservation<'_>,
) -> Result<Request, Stop> {
    let header = stream.read_header().await?;
    header.check().map_err(|_| Stop::Refused(Refusal::TooLarge))?;
    connection.server.service.admit(&connection.state, &header).map_err(Stop::NotAdmitted)?;
    let payload = stream.read_payload(header.payload_len as usize, memory).await?;
    stream.read_end().await?;
    Ok(Request { method_id: header.method_id, request_id: header.request_id, payload })
}

impl RequestStream {
    pub(super) fn new(recv: RecvStream) -> Self {
        Self { recv, rest: Bytes::new(), header: None }
    }

    /// Returns the header, once it has been read.
    pub(super) fn header(&self) -> Option<RequestHeader> {
        self.header
    }

    /// Waits for more bytes. Returns `Break` at the end of the stream.
    async fn fill(&mut self) -> Result<ControlFlow<()>, ReadError> {
        Ok(match self.recv.read_chunk(usize::MAX, true).await? {
            Some(chunk) => {
                self.rest = chunk.bytes;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        })
    }

    /// Waits for more bytes of the frame. The end of the stream is an error.
    async fn fill_more(&mut self) -> Result<(), Stop> {
        match self.fill().await? {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Stop::Refused(Refusal::Malformed)),
        }
    }

    async fn read_header(&mut self) -> Result<RequestHeader, Stop> {
        let mut bytes = [0; RequestHeader::LEN];
        let mut have = 0;
        loop {
            let part = self.rest.split_to(self.rest.len().min(bytes.len() - have));
            bytes[have..have + part.len()].copy_from_slice(&part);
            have += part.len();
            if have == bytes.len() {
                let header = RequestHeader::decode(&bytes);
                self.header = Some(header);
                return Ok(header);
            }
            self.fill_more().await?;
        }
    }

    /// Copies the payload into its own memory: quinn returns slices of whole batches of datagrams,
    /// which a waiting call would keep alive.
    async fn read_payload(
        &mut self,
        len: usize,
        memory: &mut Reservation<'_>,
    ) -> Result<Bytes, Stop> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let mut payload = Vec::new();
        loop {
            let part = self.rest.split_to(self.rest.len().min(len - payload.len()));
            append(&mut payload, &part, len, memory)?;
            if payload.len() == len {
                return Ok(payload.into());
            }
            self.fill_more().await?;
        }
    }

    async fn read_end(&mut self) -> Result<(), Stop> {
        if !self.rest.is_empty() {
            return Err(Stop::Refused(Refusal::Malformed));
        }
        match self.fill().await? {
            ControlFlow::Break(()) => Ok(()),
            ControlFlow::Continue(()) => Err(Stop::Refused(Refusal::Malformed)),
        }
    }
}

/// Appends to a payload that will have `len` bytes. The complete payload has no spare capacity. An
/// incomplete one has at most as much spare capacity as bytes that have arrived.
///
/// # Errors
/// A refusal, if the memory for requests is in use.
fn append(
    payload: &mut Vec<u8>,
    part: &[u8],
    len: usize,
    memory: &mut Reservation<'_>,
) -> Result<(), Refusal> {
    if payload.capacity() - payload.len() < part.len() {
        let least = FIRST_CHUNK.max(2 * payload.capacity());
        let wanted = (payload.len() + part.len()).max(least).min(len);
        memory.grow_to(wanted)?;
        payload.reserve_exact(wanted - payload.len());
    }
    payload.extend_from_slice(part);
    Ok(())
}

#[cfg(test)]
mod tests {
    use metrics::Gauge;

    use super::*;
    use crate::{config::TransportLimits, request_memory::RequestMemory};

    #[test]
    fn memory_is_reserved_as_bytes_arrive() {
        let len = qpq_wire::MAX_PAYLOAD as usize;
        for part in [1_200, 64 * 1024, len] {
            let mut payload = Vec::new();
            let memory = RequestMemory::new(&TransportLimits::default(), Gauge::noop());
            let connection = memory.connection([192, 0, 2, 1].into());
            let mut memory = connection.reserve();
            while payload.len() < len {
                let part = vec![7; part.min(len - payload.len())];
                append(&mut payload, &part, len, &mut memory).unwrap();
                assert!(payload.capacity() <= FIRST_CHUNK.max(2 * payload.len()).min(len));
            }
            assert_eq!(payload.capacity(), len);
        }
    }
}
