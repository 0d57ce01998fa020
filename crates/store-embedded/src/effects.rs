//! The changes in memory that follow from a committed transaction.

use qpq_domain::{StoreId, TokenHash, UnixMillis};
use qpq_ports::{Reader, View};

use crate::clock::ClockCheck;

/// The changes in memory after the commit of a transaction. `Memory::apply` applies them.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Sessions that were revoked or have expired.
    pub(crate) sessions_ended: Vec<TokenHash>,
    pub(crate) session_used: Option<SessionUse>,
    /// The reader from whose inbox messages were removed.
    pub(crate) removed_from: Option<Reader>,
    /// The readers whose reads may return more, in which view.
    pub(crate) wakes: Vec<(Reader, View)>,
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
