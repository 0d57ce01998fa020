//! The memory for answers: the maximum for a connection, an account and the whole process.
//!
//! A client that sends requests and does not read keeps its answers in memory. So memory for a
//! large answer is reserved before the answer is built, and returned when its last byte is freed.
//! The payload owns the reservation (see [`Reservation::attach`]), so it lasts while the transport
//! keeps any slice of the payload.
//!
//! A page of messages is smaller while memory is short. If there is no space for the smallest page,
//! the call waits for at most [`AnswerMemory::wait`] and is then refused.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::{
    Cx, Error,
    limits::{SubjectKey, is_pruning_due},
};

/// The unit of reservations, in bytes.
const UNIT: usize = 1 << 10;

/// The divisor of the process's free memory that gives the maximum size of a page. The rest is for
/// other calls.
const FREE_DIVISOR: usize = 4;

const USED: &str = "qpq_rpc_answer_bytes";

/// The limits of the memory for answers, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerMemory {
    /// All answers of the process.
    pub process: usize,
    /// The answers to one account, on all its connections.
    pub account: usize,
    /// The answers to one connection.
    pub connection: usize,
    /// The maximum time that a call waits for memory.
    pub wait: Duration,
}

impl AnswerMemory {
    /// The minimum of each limit: the size of the largest answer.
    pub const MIN: usize = qpq_wire::MAX_PAYLOAD as usize;
}

impl Default for AnswerMemory {
    fn default() -> Self {
        Self {
            process: 256 << 20,
            account: 16 << 20,
            connection: 8 << 20,
            wait: Duration::from_secs(5),
        }
    }
}

/// A budget of memory, shared by its clones.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Semaphore>);

impl Memory {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes / UNIT)))
    }

    fn free(&self) -> usize {
        self.0.available_permits() * UNIT
    }
}

/// The memory budgets of the process and of the subjects. Each connection owns a third one.
#[derive(Debug)]
pub(crate) struct Answers {
    limits: AnswerMemory,
    process: Memory,
    /// The budgets of the subjects that have answers now.
    subjects: Mutex<HashMap<SubjectKey, Weak<Semaphore>>>,
    used: metrics::Gauge,
}

/// Memory for one answer.
#[derive(Debug)]
pub struct Reservation {
    permits: Vec<OwnedSemaphorePermit>,
    units: usize,
    used: metrics::Gauge,
}

impl Answers {
    pub(crate) fn new(limits: AnswerMemory) -> Self {
        metrics::describe_gauge!(
            USED,
            metrics::Unit::Bytes,
            "Memory reserved for answers that clients have not received yet."
        );
        // Set now, so that the metric exists from the start.
        let used = metrics::gauge!(USED);
        used.set(0.0);
        Self { limits, process: Memory::new(limits.process), subjects: Mutex::default(), used }
    }

    /// Returns the memory of a new connection.
    pub(crate) fn new_connection(&self) -> Memory {
        Memory::new(self.limits.connection)
    }

    /// Returns the number of reserved bytes.
    pub(crate) fn used(&self) -> usize {
        (self.limits.process / UNIT * UNIT).saturating_sub(self.process.free())
    }

    /// Returns whether less than a quarter of the process's memory is free.
    pub(crate) fn is_short(&self) -> bool {
        self.process.free() < self.limits.process / 4
    }

    /// Returns the size of the largest page, from `least` to `most` bytes, for which memory is
    /// free. Returns `least` if less is free.
    pub(crate) fn page(&self, cx: Cx<'_>, subject: SubjectKey, least: usize, most: usize) -> usize {
        let free = self.process.free() / FREE_DIVISOR;
        let free = free.min(cx.conn.answer_memory().free()).min(self.of(subject).free());
        most.min(free.max(least))
    }

    /// Reserves memory for an answer of `bytes`, waiting for it if necessary.
    pub(crate) async fn reserve(
        &self,
        cx: Cx<'_>,
        subject: Option<SubjectKey>,
        bytes: usize,
    ) -> Result<Reservation, Error> {
        let units = bytes.min(AnswerMemory::MIN).div_ceil(UNIT);
        // The client's own memory comes first: a call that waits for it has reserved none of the
        // memory that others share. All calls reserve in this order, so they never wait for each
        // other in a circle.
        let own = [Some(cx.conn.answer_memory().clone()), subject.map(|subject| self.of(subject))];
        let mut reservation =
            Reservation { permits: Vec::with_capacity(3), units: 0, used: self.used.clone() };
        let all = own.into_iter().flatten().chain([self.process.clone()]);
        let mut all = all.collect::<Vec<_>>().into_iter().peekable();
        while let Some(memory) = all.next() {
            let permit = match Arc::clone(&memory.0).try_acquire_many_owned(units as u32) {
                Ok(permit) => permit,
                Err(_) => Box::pin(wait(memory, units, self.limits.wait)).await.ok_or(
                    if all.peek().is_some() { Error::UnreadAnswers } else { Error::AnswersFull },
                )?,
            };
            reservation.permits.push(permit);
        }
        reservation.units = units;
        reservation.used.increment((units * UNIT) as f64);
        Ok(reservation)
    }

    fn of(&self, subject: SubjectKey) -> Memory {
        let mut subjects = self.subjects.lock();
        if let Some(memory) = subjects.get(&subject).and_then(Weak::upgrade) {
            return Memory(memory);
        }
        if is_pruning_due(&subjects) {
            subjects.retain(|_, memory| memory.strong_count() > 0);
        }
        let memory = Memory::new(self.limits.account);
        subjects.insert(subject, Arc::downgrade(&memory.0));
        memory
    }
}

async fn wait(memory: Memory, units: usize, longest: Duration) -> Option<OwnedSemaphorePermit> {
    timeout(longest, memory.0.acquire_many_owned(units as u32)).await.ok()?.ok()
}

impl Reservation {
    /// Returns the number of reserved bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.units * UNIT
    }

    /// Returns the surplus over an answer of `bytes` to the budgets.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let surplus = self.units.saturating_sub(bytes.div_ceil(UNIT));
        for permit in &mut self.permits {
            drop(permit.split(surplus));
        }
        self.units -= surplus;
        self.used.decrement((surplus * UNIT) as f64);
    }

    /// Returns the answer as bytes that own the reservation, which ends when the last slice is
    /// dropped.
    pub(crate) fn attach(mut self, answer: Vec<u8>) -> Bytes {
        self.shrink(answer.len());
        Bytes::from_owner(Attached { answer, _reservation: self })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used.decrement((self.units * UNIT) as f64);
    }
}

struct Attached {
    answer: Vec<u8>,
    _reservation: Reservation,
}

impl AsRef<[u8]> for Attached {
    fn as_ref(&self) -> &[u8] {
        &self.answer
    }
}
