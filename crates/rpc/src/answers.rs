//! The memory for answers: how much of it a connection, an account and the whole process may use.
//!
//! A client that asks and does not read pins the answers that wait for it. So memory for a large
//! answer is reserved before the answer is built, and returned when the last byte of it is freed:
//! the reservation is part of the payload's own memory (see [`Reservation::attach`]), wherever the
//! transport keeps slices of it.
//!
//! A page of messages is made smaller when memory is short. Where not even the smallest page has
//! room, the call waits, for `MAX_WAIT` at most, and is then refused.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_domain::AccountId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::{Cx, Error};

/// Reservations are counted in units of this many bytes.
const UNIT: usize = 1 << 10;

/// A page takes at most this share of what the process has left, so that others find room too.
const SHARE_OF_REST: usize = 4;

/// The number of accounts from which unused entries are removed.
const PRUNE_FROM: usize = 1_024;

const USED: &str = "qpq_rpc_answer_bytes";

/// How much memory answers may use, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerMemory {
    /// For all answers of the process.
    pub process: usize,
    /// For the answers to one account, over all its connections.
    pub account: usize,
    /// For the answers to one connection.
    pub connection: usize,
    /// How long a call waits for memory.
    pub wait: Duration,
}

impl AnswerMemory {
    /// The least that each budget must be: the largest answer.
    pub const LEAST: usize = qpq_wire::MAX_PAYLOAD as usize;
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

/// A budget of bytes.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes / UNIT)))
    }

    fn left(&self) -> usize {
        self.0.available_permits() * UNIT
    }
}

/// The budgets of the process and of its accounts; a connection has its own.
#[derive(Debug)]
pub(crate) struct Answers {
    limits: AnswerMemory,
    process: Budget,
    /// Of the accounts that have answers under way.
    accounts: Mutex<HashMap<AccountId, Weak<Semaphore>>>,
    used: metrics::Gauge,
}

/// Memory for one answer.
#[derive(Debug)]
pub struct Reservation {
    /// In the order of [`Answers::reserve`].
    permits: Vec<OwnedSemaphorePermit>,
    units: usize,
    used: metrics::Gauge,
}

impl Answers {
    pub(crate) fn new(limits: AnswerMemory) -> Self {
        metrics::describe_gauge!(
            USED,
            metrics::Unit::Bytes,
            "Memory reserved for answers that wait for their clients."
        );
        // From the start at zero, so that it is there.
        let used = metrics::gauge!(USED);
        used.set(0.0);
        Self { limits, process: Budget::new(limits.process), accounts: Mutex::default(), used }
    }

    /// The budget of a new connection.
    pub(crate) fn of_connection(&self) -> Budget {
        Budget::new(self.limits.connection)
    }

    /// Bytes that are reserved now.
    pub(crate) fn used(&self) -> usize {
        (self.limits.process / UNIT * UNIT).saturating_sub(self.process.left())
    }

    /// Whether less than a quarter of the process's memory for answers is left.
    pub(crate) fn are_short(&self) -> bool {
        self.process.left() < self.limits.process / 4
    }

    /// The largest page, from `least` to `most` bytes, that there is room for without a wait.
    /// `least` where there is none.
    pub(crate) fn page(&self, cx: Cx<'_>, account: AccountId, least: usize, most: usize) -> usize {
        let left = self.process.left() / SHARE_OF_REST;
        let left = left.min(cx.conn.answers().left()).min(self.of_account(account).left());
        most.min(left.max(least))
    }

    /// Reserves memory for an answer of `bytes`, if need be after a wait.
    pub(crate) async fn reserve(
        &self,
        cx: Cx<'_>,
        account: Option<AccountId>,
        bytes: usize,
    ) -> Result<Reservation, Error> {
        let units = bytes.min(AnswerMemory::LEAST).div_ceil(UNIT);
        // The client's own budgets come first: while it waits for those, it takes nothing from
        // others. All wait in this order, so none waits for another in a circle.
        let own =
            [Some(cx.conn.answers().clone()), account.map(|account| self.of_account(account))];
        let mut reservation =
            Reservation { permits: Vec::with_capacity(3), units: 0, used: self.used.clone() };
        let all = own.into_iter().flatten().chain([self.process.clone()]);
        let mut all = all.collect::<Vec<_>>().into_iter().peekable();
        while let Some(budget) = all.next() {
            let permit = match Arc::clone(&budget.0).try_acquire_many_owned(units as u32) {
                Ok(permit) => permit,
                Err(_) => Box::pin(wait(budget, units, self.limits.wait)).await.ok_or(
                    if all.peek().is_some() { Error::UnreadAnswers } else { Error::AnswersFull },
                )?,
            };
            reservation.permits.push(permit);
        }
        reservation.units = units;
        reservation.used.increment((units * UNIT) as f64);
        Ok(reservation)
    }

    fn of_account(&self, account: AccountId) -> Budget {
        let mut accounts = self.accounts.lock();
        if let Some(budget) = accounts.get(&account).and_then(Weak::upgrade) {
            return Budget(budget);
        }
        if accounts.len() >= PRUNE_FROM && accounts.len() == accounts.capacity() {
            accounts.retain(|_, budget| budget.strong_count() > 0);
        }
        let budget = Budget::new(self.limits.account);
        accounts.insert(account, Arc::downgrade(&budget.0));
        budget
    }
}

async fn wait(budget: Budget, units: usize, longest: Duration) -> Option<OwnedSemaphorePermit> {
    timeout(longest, budget.0.acquire_many_owned(units as u32)).await.ok()?.ok()
}

impl Reservation {
    /// The bytes that are reserved.
    pub(crate) fn bytes(&self) -> usize {
        self.units * UNIT
    }

    /// Returns what an answer of `bytes` does not need.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let surplus = self.units.saturating_sub(bytes.div_ceil(UNIT));
        for permit in &mut self.permits {
            drop(permit.split(surplus));
        }
        self.units -= surplus;
        self.used.decrement((surplus * UNIT) as f64);
    }

    /// The answer, whose memory has the reservation with it until its last slice is dropped.
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
