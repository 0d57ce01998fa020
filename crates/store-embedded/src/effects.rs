//! The changes in memory that follow from a committed transaction.

use qpq_domain::{IdentityKey, StoreId, TokenHash, UnixMillis};
use qpq_ports::View;

use crate::{clock::ClockCheck, reader::InboxReader};

/// The changes in memory after the commit of a transaction. `Memory::apply` applies them.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Sessions that were revoked, have expired, or were bound to a device.
    pub(crate) sessions_changed: Vec<TokenHash>,
    pub(crate) session_used: Option<SessionUse>,
    /// The reader that has completed messages.
    pub(crate) completed_by: Option<InboxReader>,
    /// The inbox with an added or removed reader.
    pub(crate) readers_changed: Option<IdentityKey>,
    /// The inboxes and views whose reads may return more.
    pub(crate) wakes: Vec<(IdentityKey, View)>,
    /// The id of the history that begins with this transaction.
    pub(crate) new_store_id: Option<StoreId>,
    pub(crate) clock_check: Option<ClockCheck>,
}

/// The use of a session at an instant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionUse {
    pub(crate) token: TokenHash,
    pub(crate) used_at: UnixMillis,
    pub(crate) expires_at: UnixMillis,
}
