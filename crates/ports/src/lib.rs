//! The ports of the server: storage, counting, waking and time, as small traits.
//!
//! Each trait has one kind of state. Each of its methods is one atomic operation named after its
//! use, so a backend may implement it by a transaction, a script or a lock. Absence is an `Option`,
//! an outcome is an enum, and a failure is a [`StoreError`]. Instants are arguments
//! ([`UnixMillis`]): a backend does not read the clock to decide what a call sees.

#![warn(missing_docs)]

mod account_events;
mod accounts;
#[cfg(feature = "admission")]
pub mod admission;
mod audit;
mod bans;
#[cfg(feature = "admission")]
pub mod batcher;
mod blobs;
mod blocks;
mod clock;
#[cfg(feature = "conformance")]
#[expect(missing_docs, reason = "the name of a rule states it")]
pub mod conformance;
mod deletion;
mod devices;
mod endpoints;
mod error;
mod groups;
mod inboxes;
mod invites;
mod jobs;
mod keys;
mod limiter;
mod recovery;
mod reports;
mod sessions;
pub mod transfer;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use qpq_domain::{IdentityKey, StoreId, UnixMillis};

pub use account_events::{AccountEvent, AccountEvents, SingleEdge};
pub use accounts::{
    Account, Accounts, Admission, Credentials, NewAccount, PasswordChange, PasswordChanged,
    Registration,
};
pub use audit::{Audit, AuditAction, AuditActor, AuditEntry, AuditPage};
pub use bans::{
    Ban, BanEffects, BanRefusal, BanScope, Bans, ModerationRight, Moderator, NewBan, Unban,
};
pub use blobs::{
    BlobFinish, BlobOwner, BlobPart, BlobRange, BlobState, Blobs, ChunkOutcome, Collected,
    NewChunk, Unreference,
};
pub use blocks::{Blocking, Blocks, Unblocking};
pub use clock::{Clock, SystemClock};
pub use deletion::{
    CALLS_ENDED, Deletion, ERASE, Erasing, ErasureId, NAME_RESERVED, identity_tombstone,
    key_tombstone, name_tombstone,
};
pub use devices::{CertifiedKey, Device, DeviceRegistration, DeviceRevocation, Devices, NewDevice};
pub use endpoints::{Endpoint, Endpoints};
pub use error::{StoreError, StoreResult};
pub use groups::{
    Commit, Creation, GroupInfo, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, GroupView,
    Groups, Member, MemberPage, MetadataChange, NewGroup, NewMembers,
};
pub use inboxes::{
    Ack, Batch, CALL_BYTES, CALL_MESSAGES, Enqueued, Envelope, Inboxes, Lease, NewMessage, Page,
    PageLimit, ReadError, ReadQuery, Reader, Receipt, View, Wake, Wakes,
};
pub use invites::{EXPIRED_INVITES, Invite, InviteRevocation, Invites, NewInvite};
pub use jobs::{
    Claim, ClaimRequest, ClaimState, DeadChange, DeadJob, Job, JobEnd, JobId, JobKind, JobStats,
    Jobs, NewJob,
};
pub use keys::{
    DevicePackage, HybridKey, HybridKeys, KeyPackages, NewKeyPackage, PackageOwner, Stock,
    TakenKeyPackage, Upload, UploadMode,
};
pub use limiter::{Bucket, LimitKey, RateLimiter, Verdict};
pub use recovery::{
    AtRestKeyId, BundleFetch, BundlePut, BundleState, FETCH_DAY, NewBundle, RecoveryBundles,
    StoredBundle,
};
pub use reports::{NewReport, ReadReports, Report, Reporting, Reports};
pub use sessions::{NewSession, Session, SessionCreation, Sessions};

/// The ports that the server's composition passes to the handlers.
#[derive(Clone)]
pub struct Stores {
    /// Accounts.
    pub accounts: Arc<dyn Accounts>,
    /// Invites.
    pub invites: Arc<dyn Invites>,
    /// Sessions.
    pub sessions: Arc<dyn Sessions>,
    /// Devices.
    pub devices: Arc<dyn Devices>,
    /// Groups.
    pub groups: Arc<dyn Groups>,
    /// Inboxes and their messages.
    pub inboxes: Arc<dyn Inboxes>,
    /// Subscriptions to changes of inboxes.
    pub wakes: Arc<dyn Wakes>,
    /// KeyPackages.
    pub key_packages: Arc<dyn KeyPackages>,
    /// Hybrid keys.
    pub hybrid_keys: Arc<dyn HybridKeys>,
    /// Direct endpoints of clients.
    pub endpoints: Arc<dyn Endpoints>,
    /// Bans of the server and of groups.
    pub bans: Arc<dyn Bans>,
    /// Reports to the administrators.
    pub reports: Arc<dyn Reports>,
    /// Blocks between accounts.
    pub blocks: Arc<dyn Blocks>,
    /// The audit trail.
    pub audit: Arc<dyn Audit>,
    /// Recovery bundles.
    pub recovery_bundles: Arc<dyn RecoveryBundles>,
    /// Blobs and their uploads.
    pub blobs: Arc<dyn Blobs>,
    /// Rate limits.
    pub limiter: Arc<dyn RateLimiter>,
    /// Account events between edges.
    pub account_events: Arc<dyn AccountEvents>,
    /// Maintenance of the backend.
    pub maintenance: Arc<dyn Maintenance>,
    /// Durable jobs.
    pub jobs: Arc<dyn Jobs>,
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stores").finish_non_exhaustive()
    }
}

/// Maintenance of a backend.
#[async_trait]
pub trait Maintenance: Send + Sync {
    /// Checks that the backend can commit now, by a durable write.
    async fn check(&self) -> StoreResult<()>;

    /// Removes rows that have expired by `now`: messages, message ids, sessions, KeyPackages,
    /// bans that have ended, reports, and invites that have expired long ago.
    /// Removes at most one bounded batch of each, so that a call stays short. The caller repeats
    /// it.
    ///
    /// Moves a device to the newest message if it has not read for
    /// [`DeliveryLimits::device_absence`](qpq_domain::DeliveryLimits::device_absence) and its
    /// messages fill more than half of the inbox, by count or by bytes.
    async fn sweep(&self, now: UnixMillis) -> StoreResult<Swept>;

    /// Returns the last known id of the store's history, without reading the store. A [`Page`]
    /// contains the exact id for its seqs.
    fn store_id(&self) -> StoreId;

    /// Begins another history, after the store was replaced by an older copy of itself. In one
    /// atomic step:
    /// - the store gets another id;
    /// - every one-time KeyPackage is removed, since any of them may have been taken after the copy
    ///   was made, and none of them may be uploaded again;
    /// - with [`OldSessions::End`] every session ends, since any of them may have been ended after
    ///   the copy was made.
    ///
    /// Safe to repeat. Another process that uses the same store detects the new history with its
    /// next read.
    async fn begin_history(&self, sessions: OldSessions) -> StoreResult<NewHistory>;
}

/// The treatment of sessions when a store was replaced by an older copy of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldSessions {
    /// All sessions end, and accounts log in again. A session that was revoked after the copy was
    /// made stays revoked.
    End,
    /// Sessions of the copy stay valid, also those that were revoked after the copy was created.
    Keep,
}

/// The result of [`Maintenance::sweep`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// The number of rows that were removed or changed.
    pub rows: u64,
    /// The accounts whose devices were moved to the newest message.
    pub moved: Vec<IdentityKey>,
}

/// The result of [`Maintenance::begin_history`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewHistory {
    /// The id of the new history.
    pub store_id: StoreId,
    /// The number of removed one-time KeyPackages.
    pub removed_packages: u64,
    /// The number of ended sessions.
    pub ended_sessions: u64,
}
