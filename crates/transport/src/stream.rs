//! One stream: reads a request, runs its call, writes the answer, learns what became of it.

use std::{
    ops::ControlFlow,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use qpq_wire::{Request, RequestHeader, ResponseHeader};
use quinn::{ReadError, RecvStream, SendStream, VarInt};
use tokio::time::{Instant, timeout};

use crate::{
    Delivery, Refusal, Reply, Service,
    connection::{Connection, OpenStream},
    drain::Phase,
};

/// Stream errors carry nothing: what went wrong is in the answer, if there is one.
const NO_CODE: VarInt = VarInt::from_u32(0);

/// Memory taken for a payload before any of it has come, at most; then as much again as has come.
const FIRST_CHUNK: usize = 4096;

/// Answers from this size on are watched until their memory is free.
const WATCHED_FROM: usize = 64 * 1024;

/// The longest time between two looks at a client's pace.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);

/// Serves one stream to its end.
///
/// No `async fn`, which would keep room for its arguments and once more for what they become, and a
/// parked call is one of these futures.
pub(crate) fn serve<S: Service>(
    stream: OpenStream<S>,
    send: SendStream,
    recv: RecvStream,
) -> impl Future<Output = ()> + Send {
    let answer = Answer { send, state: AnswerState::Unfinished };
    let mut incoming = Incoming { recv, rest: Bytes::new(), header: None };
    async move {
        let connection = &*stream.connection;
        let reply = match receive(connection, &mut incoming).await {
            Received::Request(request) => {
                match run(connection, &answer, incoming.header, request).await {
                    Some(reply) => reply,
                    None => return connection.server.metrics.calls_cancelled.increment(1),
                }
            }
            Received::Answer(reply) => reply,
            Received::Nothing => return,
        };
        let header = incoming.header;
        // Dropped before its end, quinn tells the client not to send the rest. The answer is
        // another matter.
        drop(incoming);
        respond(connection, answer, header, reply).await;
    }
}

/// What came of reading.
enum Received {
    Request(Request),
    /// The request is refused.
    Answer(Reply),
    /// The client took it back, or is gone.
    Nothing,
}

/// The request half of a stream.
struct Incoming {
    recv: RecvStream,
    /// What was read and not yet used.
    rest: Bytes,
    header: Option<RequestHeader>,
}

/// Why reading ended early.
enum Stop {
    Refused(Refusal),
    NotAdmitted(Reply),
    Gone,
}

impl From<ReadError> for Stop {
    fn from(_: ReadError) -> Self {
        Self::Gone
    }
}

async fn receive<S: Service>(connection: &Connection<S>, incoming: &mut Incoming) -> Received {
    // The time runs from the first byte: a stream may be open long before, if the client sent on a
    // later one first.
    let read = match incoming.fill().await {
        Err(_) => return Received::Nothing,
        Ok(ControlFlow::Break(())) => Err(Stop::Refused(Refusal::Malformed)),
        Ok(ControlFlow::Continue(())) => {
            match timeout(connection.server.timeouts.request, read_request(connection, incoming))
                .await
            {
                Ok(read) => read,
                Err(_) => Err(Stop::Refused(Refusal::Timeout)),
            }
        }
    };
    match read {
        Ok(request) => Received::Request(request),
        Err(Stop::Refused(why)) => {
            Received::Answer(refuse(connection, incoming.header.as_ref(), why))
        }
        Err(Stop::NotAdmitted(reply)) => Received::Answer(reply),
        Err(Stop::Gone) => Received::Nothing,
    }
}

async fn read_request<S: Service>(
    connection: &Connection<S>,
    incoming: &mut Incoming,
) -> Result<Request, Stop> {
    let header = incoming.read_header().await?;
    header.check().map_err(|_| Stop::Refused(Refusal::TooLarge))?;
    connection.server.service.admit(&connection.state, &header).map_err(Stop::NotAdmitted)?;
    let payload = incoming.read_payload(header.payload_len as usize).await?;
    incoming.read_end().await?;
    Ok(Request { method_id: header.method_id, request_id: header.request_id, payload })
}

impl Incoming {
    /// Waits for more bytes; `Break` at the end of the stream.
    async fn fill(&mut self) -> Result<ControlFlow<()>, ReadError> {
        Ok(match self.recv.read_chunk(usize::MAX, true).await? {
            Some(chunk) => {
                self.rest = chunk.bytes;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        })
    }

    /// As [`fill`](Self::fill), where the end of the stream would be inside the frame.
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

    /// Copies the payload into memory of its own: what quinn hands out are slices of whole batches
    /// of datagrams, which a parked call would keep.
    async fn read_payload(&mut self, len: usize) -> Result<Bytes, Stop> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let mut payload = Vec::with_capacity(len.min(FIRST_CHUNK.max(self.rest.len())));
        loop {
            let part = self.rest.split_to(self.rest.len().min(len - payload.len()));
            append(&mut payload, &part, len);
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

/// Adds to a payload that will have `len` bytes; at its end it has no room to spare, before that at
/// most as much again as has come.
fn append(payload: &mut Vec<u8>, part: &[u8], len: usize) {
    if payload.capacity() - payload.len() < part.len() {
        let wanted = (payload.len() + part.len()).max(2 * payload.capacity()).min(len);
        payload.reserve_exact(wanted - payload.len());
    }
    payload.extend_from_slice(part);
}

fn refuse<S: Service>(
    connection: &Connection<S>,
    header: Option<&RequestHeader>,
    why: Refusal,
) -> Reply {
    connection.server.metrics.requests_refused(why).increment(1);
    connection.server.service.refuse(&connection.state, header, why)
}

/// Runs the call; `None` if it was cancelled.
async fn run<S: Service>(
    connection: &Connection<S>,
    answer: &Answer,
    header: Option<RequestHeader>,
    request: Request,
) -> Option<Reply> {
    let service = Arc::clone(&connection.server.service);
    let state = Arc::clone(&connection.state);
    // Boxed, so that reading and answering do not need the room of the largest call.
    let mut call = Box::pin(
        AssertUnwindSafe(async move { service.call(state, request).await }).catch_unwind(),
    );
    // Most calls end at once, and then the stream need not be watched.
    let reply = tokio::select! {
        biased;
        reply = &mut call => reply,
        _ = answer.send.stopped() => return None,
    };
    Some(reply.unwrap_or_else(|_| {
        connection.server.metrics.calls_panicked.increment(1);
        let method_id = header.map(|header| header.method_id);
        tracing::error!(method_id, "a call panicked");
        refuse(connection, header.as_ref(), Refusal::Internal)
    }))
}

/// The response half of a stream. quinn ends a dropped stream cleanly, which would make half an
/// answer look like a whole one; this resets it.
struct Answer {
    send: SendStream,
    state: AnswerState,
}

#[derive(PartialEq)]
enum AnswerState {
    Unfinished,
    Finished,
}

impl Answer {
    /// Writes the frame and ends the stream, at the pace that the client must keep.
    async fn write<S: Service>(
        &mut self,
        frame: &mut [Bytes],
        pace: &mut Pace<'_, S>,
    ) -> Result<(), Unsent> {
        let mut frame = frame;
        while !frame.is_empty() {
            pace.check()?;
            // Cancel-safe: nothing is written by a future that was dropped.
            if let Ok(written) = timeout(pace.look, self.send.write_chunks(frame)).await {
                frame = &mut frame[written.map_err(|_| Unsent::Gone)?.chunks..];
                pace.moved = Instant::now();
            }
        }
        self.send.finish().map_err(|_| Unsent::Gone)?;
        self.state = AnswerState::Finished;
        Ok(())
    }

    /// Takes back what is still on its way.
    fn give_up(&mut self) {
        let _ = self.send.reset(NO_CODE);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.state == AnswerState::Unfinished {
            self.give_up();
        }
    }
}

/// The client will not have the answer.
#[derive(Clone, Copy, PartialEq)]
enum Unsent {
    /// It stopped the stream or its connection ended, or nothing is heard of it.
    Gone,
    /// It accepts the answer too slowly.
    TooSlow,
}

/// The pace at which a client must accept an answer.
///
/// The whole answer has a time, not each piece of it: with 64 bytes every 12 s a client could
/// otherwise pin 4 MiB for 9 days.
struct Pace<'a, S: Service> {
    connection: &'a Connection<S>,
    len: usize,
    started: Instant,
    /// When the client last accepted anything.
    moved: Instant,
    /// Between two checks.
    look: Duration,
}

impl<'a, S: Service> Pace<'a, S> {
    fn new(connection: &'a Connection<S>, len: usize) -> Self {
        let now = Instant::now();
        let look = (connection.server.timeouts.stalled_reply / 4).min(LOOK_AT_LEAST_EVERY);
        Self { connection, len, started: now, moved: now, look }
    }

    /// Whether the client accepts the answer fast enough.
    fn check(&self) -> Result<(), Unsent> {
        let Patience { stalled, .. } = self.patience();
        if self.moved.elapsed() < stalled { self.check_whole() } else { Err(Unsent::TooSlow) }
    }

    /// As [`check`](Self::check) where everything is written. How much of that arrived is not
    /// known, so only the time of the whole answer counts.
    fn check_whole(&self) -> Result<(), Unsent> {
        let Patience { whole, .. } = self.patience();
        if self.started.elapsed() < whole { Ok(()) } else { Err(Unsent::TooSlow) }
    }

    fn patience(&self) -> Patience {
        let server = &self.connection.server;
        let rate = server.gate.limits().min_reply_rate;
        let short = server.service.is_short_of_memory();
        Patience::new(self.len, server.timeouts.stalled_reply, rate, short)
    }
}

/// How long a client may take for an answer.
#[derive(Debug, PartialEq)]
struct Patience {
    /// To accept any more of it.
    stalled: Duration,
    /// To accept all of it.
    whole: Duration,
}

impl Patience {
    fn new(len: usize, stalled: Duration, rate: u64, short_of_memory: bool) -> Self {
        let (stalled, rate) =
            if short_of_memory { (stalled / 3, rate.saturating_mul(8)) } else { (stalled, rate) };
        let millis = len as u64 * 1_000 / rate.max(1);
        Self { stalled, whole: stalled + Duration::from_millis(millis) }
    }
}

async fn respond<S: Service>(
    connection: &Connection<S>,
    mut answer: Answer,
    header: Option<RequestHeader>,
    reply: Reply,
) {
    let Reply { status, payload, on_delivery } = fitting(connection, header, reply);
    let request_id = header.map_or(0, |header| header.request_id);
    let header = ResponseHeader { status, request_id, payload_len: payload.len() as u32 }.encode();
    let len = payload.len();
    let (payload, memory) = watched(payload);
    let mut frame = [Bytes::copy_from_slice(&header), payload];
    let mut pace = Pace::new(connection, len);
    let mut outcome = answer.write(&mut frame, &mut pace).await;
    drop(frame);
    // A close discards what is unacknowledged, so a drain waits for it.
    let draining = *connection.server.phase.borrow() == Phase::Draining;
    if outcome.is_ok() && (on_delivery.is_some() || memory.is_some() || draining) {
        outcome = acknowledged(&answer.send, &pace).await;
    }
    if outcome == Err(Unsent::TooSlow) {
        connection.server.metrics.replies_too_slow.increment(1);
    }
    match on_delivery {
        Some(delivery) => Box::pin(settle(connection, answer, outcome, delivery)).await,
        None => {
            if outcome.is_err() {
                answer.give_up();
            }
            drop(answer);
        }
    }
    if let (Err(_), Some(memory)) = (outcome, memory) {
        Box::pin(released(connection, memory)).await;
    }
}

/// The payload, and where it is large, something that is alive as long as any of its memory is.
fn watched(payload: Bytes) -> (Bytes, Option<Weak<Bytes>>) {
    if payload.len() < WATCHED_FROM {
        return (payload, None);
    }
    let owner = Arc::new(payload);
    let memory = Arc::downgrade(&owner);
    (Bytes::from_owner(Watched(owner)), Some(memory))
}

struct Watched(Arc<Bytes>);

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Waits until the memory of an answer that was taken back is free, which it is once the client
/// has acknowledged the reset. The connection of a client that does not is closed.
async fn released<S: Service>(connection: &Connection<S>, memory: Weak<Bytes>) {
    let patience = connection.server.timeouts.silent_peer;
    let since = Instant::now();
    while memory.strong_count() > 0 {
        if since.elapsed() >= patience {
            tracing::debug!(
                "a client does not acknowledge what it was sent: closing its connection"
            );
            connection.quic.close(NO_CODE, b"answers are not acknowledged");
            return;
        }
        if timeout(patience / 8, connection.quic.closed()).await.is_ok() {
            return;
        }
    }
}

/// The reply, or the one that says that it does not fit a frame.
fn fitting<S: Service>(
    connection: &Connection<S>,
    header: Option<RequestHeader>,
    reply: Reply,
) -> Reply {
    let fits = |reply: &Reply| reply.payload.len() <= qpq_wire::MAX_PAYLOAD as usize;
    if fits(&reply) {
        return reply;
    }
    tracing::error!(len = reply.payload.len(), "a reply does not fit a frame");
    let refusal = refuse(connection, header.as_ref(), Refusal::Internal);
    if fits(&refusal) { refusal } else { Reply::new(refusal.status, Bytes::new()) }
}

async fn settle<S: Service>(
    connection: &Connection<S>,
    mut answer: Answer,
    outcome: Result<(), Unsent>,
    delivery: Box<dyn Delivery>,
) {
    let metrics = &connection.server.metrics;
    if outcome.is_ok() {
        metrics.replies_delivered.increment(1);
        drop(answer);
        delivery.delivered().await;
    } else {
        metrics.replies_lost.increment(1);
        answer.give_up();
        drop(answer);
        delivery.lost().await;
    }
}

/// Waits until the client's QUIC stack has every byte. A client that is not heard of for too long
/// counts as gone, long before its connection times out; one that is heard of and acknowledges
/// nothing is too slow.
async fn acknowledged<S: Service>(send: &SendStream, pace: &Pace<'_, S>) -> Result<(), Unsent> {
    let connection = pace.connection;
    let silent_peer = connection.server.timeouts.silent_peer;
    let mut stopped = pin!(send.stopped());
    let mut heard = connection.quic.stats().udp_rx.datagrams;
    let mut since = Instant::now();
    loop {
        match timeout(silent_peer / 4, stopped.as_mut()).await {
            Ok(Ok(None)) => return Ok(()),
            Ok(_) => return Err(Unsent::Gone),
            Err(_) => {
                pace.check_whole()?;
                let now = connection.quic.stats().udp_rx.datagrams;
                if now != heard {
                    (heard, since) = (now, Instant::now());
                } else if since.elapsed() >= silent_peer {
                    return Err(Unsent::Gone);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_the_time_of_the_whole_answer_and_less_where_memory_is_short() {
        let seconds = Duration::from_secs;
        let (full, rate) = (4 << 20, 8 << 10);
        let patience = Patience::new(full, seconds(30), rate, false);
        assert_eq!(patience, Patience { stalled: seconds(30), whole: seconds(30 + 512) });
        let patience = Patience::new(full, seconds(30), rate, true);
        assert_eq!(patience, Patience { stalled: seconds(10), whole: seconds(10 + 64) });
        let patience = Patience::new(0, seconds(30), 0, false);
        assert_eq!(patience, Patience { stalled: seconds(30), whole: seconds(30) });
    }

    #[test]
    fn memory_is_taken_as_bytes_come() {
        let len = qpq_wire::MAX_PAYLOAD as usize;
        for part in [1_200, 64 * 1024, len] {
            let mut payload = Vec::with_capacity(FIRST_CHUNK);
            while payload.len() < len {
                let part = vec![7; part.min(len - payload.len())];
                append(&mut payload, &part, len);
                assert!(payload.capacity() <= FIRST_CHUNK.max(2 * payload.len()).min(len));
            }
            assert_eq!(payload.capacity(), len);
        }
    }
}
