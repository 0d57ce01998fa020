//! Events to a client: frame after frame on one unidirectional stream, opened with the first event.
//!
//! Most connections never get one, so a sink costs nothing until then: there is no channel and no
//! task, only a queue that a writer task empties while there is something in it.

use std::{collections::VecDeque, fmt, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_wire::{Event, FrameError};
use quinn::{SendStream, VarInt};
use tokio::runtime::Handle;

/// Events that wait for a client, ...
const MAX_QUEUED: usize = 256;
/// ... and their bytes; one event may be above it alone.
const MAX_QUEUED_BYTES: usize = 1024 * 1024;

/// Sends events to one connection. Cheap to clone; it does not keep the connection alive.
#[derive(Clone)]
pub struct EventSink {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    runtime: Handle,
}

enum State {
    /// Nothing to write; the stream once it is open.
    Idle { connection: quinn::Connection, stream: Option<SendStream> },
    /// A writer task has connection and stream, and takes from here.
    Writing { queue: VecDeque<[Bytes; 2]>, bytes: usize },
    /// The connection is gone.
    Closed,
}

/// Why an event was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// The connection has ended.
    #[error("the connection is gone")]
    Gone,
    /// The client does not read what it was sent; this event is dropped, earlier ones are not.
    #[error("the client does not keep up with its events")]
    Full,
    /// The payload does not fit a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl EventSink {
    pub(crate) fn new(connection: quinn::Connection) -> Self {
        let state = Mutex::new(State::Idle { connection, stream: None });
        Self { shared: Arc::new(Shared { state, runtime: Handle::current() }) }
    }

    /// Queues an event; it never waits.
    ///
    /// # Errors
    /// [`EventError`]; the event is then not sent.
    pub fn send(&self, event_type: u16, payload: Bytes) -> Result<(), EventError> {
        let event = Event { event_type, payload };
        let header = event.header()?.encode();
        let frame = [Bytes::copy_from_slice(&header), event.payload];
        let mut state = self.shared.state.lock();
        if let State::Writing { queue, bytes } = &mut *state {
            let more = len(&frame);
            if queue.len() >= MAX_QUEUED || (*bytes > 0 && *bytes + more > MAX_QUEUED_BYTES) {
                return Err(EventError::Full);
            }
            *bytes += more;
            queue.push_back(frame);
            return Ok(());
        }
        let writing = State::Writing { bytes: len(&frame), queue: VecDeque::from([frame]) };
        match std::mem::replace(&mut *state, writing) {
            State::Idle { connection, stream } => {
                self.shared.runtime.spawn(write(Arc::clone(&self.shared), connection, stream));
                Ok(())
            }
            closed => {
                *state = closed;
                Err(EventError::Gone)
            }
        }
    }

    /// Lets go of the connection.
    pub(crate) fn close(&self) {
        let state = std::mem::replace(&mut *self.shared.state.lock(), State::Closed);
        // Outside of the lock: a stream's drop takes quinn's.
        drop(state);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.shared.state.lock() {
            State::Idle { .. } => "idle",
            State::Writing { .. } => "writing",
            State::Closed => "closed",
        };
        f.debug_tuple("EventSink").field(&state).finish()
    }
}

/// Empties the queue, then gives connection and stream back.
async fn write(shared: Arc<Shared>, connection: quinn::Connection, stream: Option<SendStream>) {
    let mut stream = match stream {
        Some(stream) => stream,
        None => match connection.open_uni().await {
            Ok(stream) => stream,
            Err(_) => return shared.give_up(),
        },
    };
    loop {
        let mut frame = {
            let mut state = shared.state.lock();
            // Closed means that the connection is gone: what was queued is too.
            let State::Writing { queue, bytes } = &mut *state else { return };
            match queue.pop_front() {
                Some(frame) => {
                    *bytes -= len(&frame);
                    frame
                }
                None => {
                    *state = State::Idle { connection, stream: Some(stream) };
                    return;
                }
            }
        };
        if stream.write_all_chunks(&mut frame).await.is_err() {
            // Half a frame must not look like the end of the stream.
            let _ = stream.reset(VarInt::from_u32(0));
            return shared.give_up();
        }
    }
}

impl Shared {
    /// No event can be sent any more: the connection is gone, or its client stopped the stream.
    fn give_up(&self) {
        *self.state.lock() = State::Closed;
    }
}

fn len([header, payload]: &[Bytes; 2]) -> usize {
    header.len() + payload.len()
}
