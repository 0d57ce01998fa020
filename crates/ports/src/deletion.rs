//! The deletion of accounts: one atomic step that makes an account unusable, and an erasure of its
//! data in small batches, which a job runs.
//!
//! The step replaces the account's username and identity key by random values, so no look-up finds
//! the account any more, and the account has no inbox and no session. Calls that began before the
//! step may still write rows for the account. Therefore the erasure looks at everything again once
//! these calls have ended ([`CALLS_ENDED`]), and only then is it done.

use std::{fmt, time::Duration};

use qpq_domain::{IdentityKey, Skeleton};

use crate::{JobKind, NewJob, transfer::sha256};

/// The kind of the jobs that erase deleted accounts. The payload is an [`ErasureId`].
pub const ERASE: JobKind = JobKind::new("erase");

/// The time after a deletion at which every call that began before it has ended.
///
/// Longer than the longest deadline of a call (two minutes), and than the time for which an edge
/// may use a copy of a session.
pub const CALLS_ENDED: Duration = Duration::from_secs(3 * 60);

/// The time for which the username of a deleted account stays reserved.
///
/// As long as the longest lifetime of a message and of a session, so that nothing that was meant
/// for the owner of the deleted account reaches the next owner of its name.
pub const NAME_RESERVED: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// The number of an erasure: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ErasureId([u8; 16]);

impl ErasureId {
    /// Creates an id from its bytes.
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Returns the job that runs the erasure.
    pub fn job(&self) -> NewJob {
        NewJob {
            kind: ERASE,
            key: Some(self.0.to_vec()),
            payload: self.0.to_vec(),
            delay: Duration::ZERO,
        }
    }

    /// Returns the erasure of a job with this payload; `None` if the payload is of another kind.
    pub fn of_job(payload: &[u8]) -> Option<Self> {
        payload.try_into().ok().map(Self)
    }
}

impl fmt::Debug for ErasureId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ErasureId")
    }
}

/// The outcome of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    /// The account is unusable, and its erasure is stored with the job that runs it.
    Deleted(ErasureId),
    /// There is no such account, or it was deleted before.
    NotFound,
}

/// The progress of an erasure after one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erasing {
    /// More may be left.
    More,
    /// Nothing is left now. Calls that are still in progress may write more, so the erasure must
    /// run again after this time.
    WaitFor(Duration),
    /// Everything is erased.
    Done,
}

/// Returns the tombstone of an identity key or device key, which can never be registered again.
pub fn key_tombstone(key: &[u8; 32]) -> Vec<u8> {
    sha256(&[&b"qpq/key/1"[..], key].concat())
}

/// Returns the tombstone of the username of a deleted account, for [`NAME_RESERVED`].
pub fn name_tombstone(skeleton: &Skeleton) -> Vec<u8> {
    sha256(&[&b"qpq/name/1"[..], skeleton.as_str().as_bytes()].concat())
}

/// Returns the tombstone of an account's identity key. See [`key_tombstone`].
pub fn identity_tombstone(identity: &IdentityKey) -> Vec<u8> {
    key_tombstone(identity.as_bytes())
}
