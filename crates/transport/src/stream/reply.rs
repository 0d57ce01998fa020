//! Writing one reply at the pace that its client must keep, and observing its delivery.

use std::{
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use qpq_wire::{Refusal, RequestHeader, ResponseHeader};
use quinn::SendStream;
use tokio::time::{Instant, timeout};

use super::{NO_CODE, refuse};
use crate::{
    context::ConnectionContext,
    service::{DeliveryObserver, Reply, Service},
};

/// The size in bytes from which a reply is watched until its memory is freed.
const WATCHED_FROM: usize = 64 * 1024;

/// The longest time between two checks of a client's pace.
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The reply half of a stream.
///
/// quinn ends a dropped stream cleanly, so that half a reply would look complete. This type resets
/// it.
pub(super) struct ReplyStream {
    send: SendStream,
    state: StreamState,
}

#[derive(PartialEq)]
enum StreamState {
    Unfinished,
    Finished,
}

/// The reason why the client will not receive the reply.
#[derive(Clone, Copy, PartialEq)]
enum SendFailure {
    /// The client stopped the stream, is silent for too long, or its connection ended.
    Lost,
    /// The client accepts the reply too slowly.
    TooSlow,
}

/// Sends the reply and notifies its observer.
pub(super) async fn send<S: Service>(
    connection: &ConnectionContext<S>,
    mut stream: ReplyStream,
    header: Option<RequestHeader>,
    reply: Reply,
) {
    let Reply { status, payload, on_delivery } = fit_frame(connection, header, reply);
    let request_id = header.map_or(0, |header| header.request_id);
    let header = ResponseHeader { status, request_id, payload_len: payload.len() as u32 }.encode();
    let len = payload.len();
    let (payload, memory) = watch_memory(payload);
    let mut frame = [Bytes::copy_from_slice(&header), payload];
    let mut pace = Pace::new(connection, len);
    let mut outcome = stream.write(&mut frame, &mut pace).await;
    drop(frame);
    // The close of a connection discards unacknowledged bytes, so a drain waits for them.
    let server = &connection.server;
    let is_watched = on_delivery.is_some() || memory.is_some();
    if outcome.is_ok() && (is_watched || server.draining.is_cancelled()) {
        outcome = acknowledged(&stream.send, &pace).await;
    }
    if outcome == Err(SendFailure::TooSlow) {
        server.metrics.replies_too_slow.increment(1);
    }
    match on_delivery {
        Some(observer) => Box::pin(notify(connection, stream, outcome, observer)).await,
        None => {
            if outcome.is_err() {
                stream.reset();
            }
            drop(stream);
        }
    }
    if let (Err(_), Some(memory)) = (outcome, memory) {
        Box::pin(freed(connection, memory)).await;
    }
}

/// Returns the reply, or an internal error if the reply does not fit a frame.
fn fit_frame<S: Service>(
    connection: &ConnectionContext<S>,
    header: Option<RequestHeader>,
    reply: Reply,
) -> Reply {
    let fits = |reply: &Reply| reply.payload.len() <= qpq_wire::MAX_PAYLOAD as usize;
    if fits(&reply) {
        return reply;
    }
    tracing::error!(len = reply.payload.len(), "reply does not fit a frame");
    let refusal = refuse(connection, header.as_ref(), Refusal::Internal);
    if fits(&refusal) { refusal } else { Reply::new(refusal.status, Bytes::new()) }
}

/// Returns the payload, and if it is large, a reference that expires when its memory is freed.
fn watch_memory(payload: Bytes) -> (Bytes, Option<Weak<Bytes>>) {
    if payload.len() < WATCHED_FROM {
        return (payload, None);
    }
    let owner = Arc::new(payload);
    let memory = Arc::downgrade(&owner);
    (Bytes::from_owner(WatchedPayload(owner)), Some(memory))
}

struct WatchedPayload(Arc<Bytes>);

impl AsRef<[u8]> for WatchedPayload {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl ReplyStream {
    pub(super) fn new(send: SendStream) -> Self {
        Self { send, state: StreamState::Unfinished }
    }

    /// Waits until the client stops the stream or the connection ends.
    pub(super) fn stopped(&self) -> impl Future<Output: Sized> + Send + use<> {
        self.send.stopped()
    }

    /// Writes the frame and ends the stream, if the client keeps the pace.
    async fn write<S: Service>(
        &mut self,
        frame: &mut [Bytes],
        pace: &mut Pace<'_, S>,
    ) -> Result<(), SendFailure> {
        let mut frame = frame;
        while !frame.is_empty() {
            pace.check()?;
            // Cancel-safe: a dropped future has written nothing.
            if let Ok(written) = timeout(pace.interval, self.send.write_chunks(frame)).await {
                frame = &mut frame[written.map_err(|_| SendFailure::Lost)?.chunks..];
                pace.progressed = Instant::now();
            }
        }
        self.send.finish().map_err(|_| SendFailure::Lost)?;
        self.state = StreamState::Finished;
        Ok(())
    }

    /// Discards the bytes that are not yet acknowledged.
    fn reset(&mut self) {
        let _ = self.send.reset(NO_CODE);
    }
}

impl Drop for ReplyStream {
    fn drop(&mut self) {
        if self.state == StreamState::Unfinished {
            self.reset();
        }
    }
}

/// The pace at which a client must accept a reply.
///
/// The time limit is for the whole reply, not for each part: by reading 64 bytes every 12 s a
/// client could otherwise pin 4 MiB for 9 days.
struct Pace<'a, S: Service> {
    connection: &'a ConnectionContext<S>,
    len: usize,
    started: Instant,
    /// The last time at which the client accepted bytes.
    progressed: Instant,
    /// The time between two checks.
    interval: Duration,
}

impl<'a, S: Service> Pace<'a, S> {
    fn new(connection: &'a ConnectionContext<S>, len: usize) -> Self {
        let now = Instant::now();
        let interval = (connection.server.timeouts.stalled_reply / 4).min(MAX_CHECK_INTERVAL);
        Self { connection, len, started: now, progressed: now, interval }
    }

    /// Fails if the client accepts the reply too slowly.
    fn check(&self) -> Result<(), SendFailure> {
        if self.progressed.elapsed() < self.time_limits().stalled {
            self.check_whole()
        } else {
            Err(SendFailure::TooSlow)
        }
    }

    /// Fails if the time for the whole reply is over. Used alone for a reply that is completely
    /// written, because its further progress is unknown.
    fn check_whole(&self) -> Result<(), SendFailure> {
        if self.started.elapsed() < self.time_limits().whole {
            Ok(())
        } else {
            Err(SendFailure::TooSlow)
        }
    }

    fn time_limits(&self) -> TimeLimits {
        let server = &self.connection.server;
        let rate = server.admission.limits().min_reply_rate;
        let is_short_of_memory = server.service.is_short_of_memory();
        TimeLimits::new(self.len, server.timeouts.stalled_reply, rate, is_short_of_memory)
    }
}

/// The time limits of one reply.
#[derive(Debug, PartialEq)]
struct TimeLimits {
    /// The maximum time in which the client accepts no more of the reply.
    stalled: Duration,
    /// The maximum time in which the client accepts the whole reply.
    whole: Duration,
}

impl TimeLimits {
    fn new(len: usize, stalled: Duration, rate: u64, is_short_of_memory: bool) -> Self {
        let (stalled, rate) = if is_short_of_memory {
            (stalled / 3, rate.saturating_mul(8))
        } else {
            (stalled, rate)
        };
        let millis = len as u64 * 1_000 / rate.max(1);
        Self { stalled, whole: stalled + Duration::from_millis(millis) }
    }
}

/// Waits until the client's QUIC stack has acknowledged every byte.
///
/// A client that sends no datagram for too long is lost, long before its connection times out. A
/// client that sends datagrams and acknowledges nothing is too slow.
async fn acknowledged<S: Service>(
    send: &SendStream,
    pace: &Pace<'_, S>,
) -> Result<(), SendFailure> {
    let connection = pace.connection;
    let silent_peer = connection.server.timeouts.silent_peer;
    let mut stopped = pin!(send.stopped());
    let mut received = connection.quic.stats().udp_rx.datagrams;
    let mut since = Instant::now();
    loop {
        match timeout(silent_peer / 4, stopped.as_mut()).await {
            Ok(Ok(None)) => return Ok(()),
            Ok(_) => return Err(SendFailure::Lost),
            Err(_) => {
                pace.check_whole()?;
                let now = connection.quic.stats().udp_rx.datagrams;
                if now != received {
                    (received, since) = (now, Instant::now());
                } else if since.elapsed() >= silent_peer {
                    return Err(SendFailure::Lost);
                }
            }
        }
    }
}

async fn notify<S: Service>(
    connection: &ConnectionContext<S>,
    mut stream: ReplyStream,
    outcome: Result<(), SendFailure>,
    observer: Box<dyn DeliveryObserver>,
) {
    let metrics = &connection.server.metrics;
    if outcome.is_ok() {
        metrics.replies_delivered.increment(1);
        drop(stream);
        observer.delivered().await;
    } else {
        metrics.replies_lost.increment(1);
        stream.reset();
        drop(stream);
        observer.lost().await;
    }
}

/// Waits until the memory of a reset reply is freed, which happens once the client has acknowledged
/// the reset. Closes the connection of a client that does not acknowledge it.
async fn freed<S: Service>(connection: &ConnectionContext<S>, memory: Weak<Bytes>) {
    let limit = connection.server.timeouts.silent_peer;
    let since = Instant::now();
    while memory.strong_count() > 0 {
        if since.elapsed() >= limit {
            tracing::debug!("client does not acknowledge a reset, closing its connection");
            connection.quic.close(NO_CODE, b"answers are not acknowledged");
            return;
        }
        if timeout(limit / 8, connection.quic.closed()).await.is_ok() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_limits_grow_with_the_reply_and_shrink_under_memory_pressure() {
        let seconds = Duration::from_secs;
        let (full, rate) = (4 << 20, 8 << 10);
        let limits = TimeLimits::new(full, seconds(30), rate, false);
        assert_eq!(limits, TimeLimits { stalled: seconds(30), whole: seconds(30 + 512) });
        let limits = TimeLimits::new(full, seconds(30), rate, true);
        assert_eq!(limits, TimeLimits { stalled: seconds(10), whole: seconds(10 + 64) });
        let limits = TimeLimits::new(0, seconds(30), 0, false);
        assert_eq!(limits, TimeLimits { stalled: seconds(30), whole: seconds(30) });
    }
}
