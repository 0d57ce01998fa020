//! What the server needs from the world: storage, counting, waking and time, as small traits.
//!
//! Each trait keeps one kind of state and each of its methods is one atomic operation in the words
//! of its use, so a backend is free to make it a transaction, a script or a lock. Absence is an
//! `Option`, what may happen is an enum, and what may fail is a [`StoreError`]. Instants come in as
//! arguments ([`UnixMillis`]): a backend never asks what time it is.

mod account_events;
mod accounts;
#[cfg(feature = "admission")]
pub mod admission;
#[cfg(feature = "admission")]
pub mod batcher;
mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod inboxes;
mod jobs;
mod keys;
mod limiter;
mod sessions;
mod shard;
pub mod transfer;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use qpq_domain::{StoreId, UnixMillis};

pub use account_events::{AccountEvent, AccountEvents, SingleEdge};
pub use accounts::{Account, Accounts, Credentials, NewAccount, Registration};
pub use clock::{Clock, SystemClock};
pub use error::{StoreError, StoreResult};
pub use inboxes::{
    Ack, Batch, CALL_BYTES, CALL_MESSAGES, Enqueued, Envelope, Inboxes, Lease, NewMessage, Page,
    PageLimit, ReadQuery, Reader, Receipt, View, Wake, Wakes,
};
pub use jobs::{
    Claim, ClaimRequest, ClaimState, DeadChange, DeadJob, Job, JobEnd, JobId, JobKind, JobStats,
    Jobs, NewJob,
};
pub use keys::{
    HybridKeys, KeyPackages, NewKeyPackage, Stock, TakenKeyPackage, Upload, UploadMode,
};
pub use limiter::{Bucket, LimitKey, RateLimiter, Verdict};
pub use sessions::{NewSession, Session, Sessions};
pub use shard::Shard;

/// Everything that keeps state, as the server's composition hands it to the handlers.
#[derive(Clone)]
pub struct Stores {
    pub accounts: Arc<dyn Accounts>,
    pub sessions: Arc<dyn Sessions>,
    pub inboxes: Arc<dyn Inboxes>,
    pub wakes: Arc<dyn Wakes>,
    pub key_packages: Arc<dyn KeyPackages>,
    pub hybrid_keys: Arc<dyn HybridKeys>,
    pub limiter: Arc<dyn RateLimiter>,
    pub account_events: Arc<dyn AccountEvents>,
    pub maintenance: Arc<dyn Maintenance>,
    pub jobs: Arc<dyn Jobs>,
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stores").finish_non_exhaustive()
    }
}

/// A backend's own care for itself.
#[async_trait]
pub trait Maintenance: Send + Sync {
    /// Whether the backend can commit right now: a real write, made durable, or the reason why not.
    async fn check(&self) -> StoreResult<()>;

    /// Removes what has expired by `now`: messages, forgotten message ids, sessions, KeyPackages.
    /// At most one bounded batch of each; answers how many rows went, so that the caller repeats
    /// while it is worth it.
    async fn sweep(&self, now: UnixMillis) -> StoreResult<u64>;

    /// Returns the history that the store is in, as far as this process has noticed. Reads nothing.
    /// A page has the id that is exact for its seqs.
    fn store_id(&self) -> StoreId;

    /// Begins another history, after the store was replaced by an older copy of itself. In one
    /// atomic step:
    /// - the store gets another id;
    /// - every one-time KeyPackage is removed, since any of them may have been given out after the
    ///   copy was made, and none of them may be uploaded again.
    ///
    /// Safe to repeat. Another process that uses the same store notices with its next read.
    async fn begin_history(&self) -> StoreResult<NewHistory>;
}

/// What [`Maintenance::begin_history`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewHistory {
    pub store_id: StoreId,
    /// One-time KeyPackages removed.
    pub removed_packages: u64,
}
