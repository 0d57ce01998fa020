//! Events to a client: frame after frame on one unidirectional stream, opened with the first event.
//!
//! Most connections never receive an event. So an idle sink has no channel and no task, only a
//! queue. While the queue has events, a writer task sends them.

use std::{collections::VecDeque, fmt, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_wire::{EventFrame, FrameError};
use quinn::{SendStream, VarInt};
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

/// The capacity of the queue, in events.
const QUEUE_CAPACITY: usize = 256;
/// The capacity of the queue, in bytes. A single event may be larger.
const QUEUE_CAPACITY_BYTES: usize = 1024 * 1024;

/// Sends events to one connection. Cheap to clone. Does not keep the connection open.
#[derive(Clone)]
pub struct EventSink {
    queue: Arc<EventQueue>,
}

/// The events of one connection, shared by its sinks and its writer task.
struct EventQueue {
    state: Mutex<State>,
    /// The runtime on which the writer task is spawned, because a sink may be used outside of it.
    runtime: Handle,
    /// The owner of the writer task. Closing the endpoints ends the task.
    tasks: TaskTracker,
}

enum State {
    /// No event is waiting. The stream is `None` before the first event.
    Idle { connection: quinn::Connection, stream: Option<SendStream> },
    /// The writer task has the connection and the stream, and sends the queued frames.
    Writing { queue: VecDeque<[Bytes; 2]>, bytes: usize },
    /// The connection has ended, or the client has stopped the stream.
    Closed,
}

/// The reason why an event was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// The connection has ended.
    #[error("the connection has ended")]
    Closed,
    /// The client reads its events too slowly. This event is dropped, earlier ones are not.
    #[error("the client does not keep up with its events")]
    Full,
    /// The payload does not fit a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl EventSink {
    pub(crate) fn new(connection: quinn::Connection, tasks: TaskTracker) -> Self {
        let state = Mutex::new(State::Idle { connection, stream: None });
        Self { queue: Arc::new(EventQueue { state, runtime: Handle::current(), tasks }) }
    }

    /// Queues an event. Never waits.
    ///
    /// # Errors
    /// [`EventError`]. The event is then not sent.
    pub fn send(&self, event_type: u16, payload: Bytes) -> Result<(), EventError> {
        let event = EventFrame { event_type, payload };
        let header = event.header()?.encode();
        let frame = [Bytes::copy_from_slice(&header), event.payload];
        let mut state = self.queue.state.lock();
        if let State::Writing { queue, bytes } = &mut *state {
            let more = len(&frame);
            if queue.len() >= QUEUE_CAPACITY || (*bytes > 0 && *bytes + more > QUEUE_CAPACITY_BYTES)
            {
                return Err(EventError::Full);
            }
            *bytes += more;
            queue.push_back(frame);
            return Ok(());
        }
        let writing = State::Writing { bytes: len(&frame), queue: VecDeque::from([frame]) };
        match std::mem::replace(&mut *state, writing) {
            State::Idle { connection, stream } => {
                let EventQueue { runtime, tasks, .. } = &*self.queue;
                tasks.spawn_on(write(Arc::clone(&self.queue), connection, stream), runtime);
                Ok(())
            }
            closed => {
                *state = closed;
                Err(EventError::Closed)
            }
        }
    }

    /// Releases the connection.
    pub(crate) fn close(&self) {
        let state = std::mem::replace(&mut *self.queue.state.lock(), State::Closed);
        // Dropped outside of the lock, because the drop of a stream takes a lock of quinn.
        drop(state);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.queue.state.lock() {
            State::Idle { .. } => "idle",
            State::Writing { .. } => "writing",
            State::Closed => "closed",
        };
        f.debug_tuple("EventSink").field(&state).finish()
    }
}

/// Sends the queued events, then returns the connection and the stream to the idle state.
async fn write(events: Arc<EventQueue>, connection: quinn::Connection, stream: Option<SendStream>) {
    let mut stream = match stream {
        Some(stream) => stream,
        None => match connection.open_uni().await {
            Ok(stream) => stream,
            Err(_) => return events.close(),
        },
    };
    loop {
        let mut frame = {
            let mut state = events.state.lock();
            // Closed: the connection has ended, and with it the queued events.
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
            return events.close();
        }
    }
}

impl EventQueue {
    /// Refuses all further events: the connection has ended, or the client has stopped the stream.
    fn close(&self) {
        *self.state.lock() = State::Closed;
    }
}

/// Returns the length of a frame.
fn len([header, payload]: &[Bytes; 2]) -> usize {
    header.len() + payload.len()
}
