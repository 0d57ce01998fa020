//! The effects of a committed transaction outside Postgres: copies to invalidate, leases to end,
//! edges to wake.
//!
//! A transaction returns its effects as one value, and they are applied in one place, after the
//! commit. Only Postgres determines the state of the store. An edge that is killed between the
//! commit and its effects causes only a delay: a queue in Redis is behind, a session's copy is used
//! until it expires, and a waiting edge finds the message with its next poll.

use std::collections::HashMap;

use qpq_domain::{IdentityKey, Seq, StoreId, TokenHash};
use qpq_ports::View;

use crate::{
    redis::queue::{LeaseId, Queued, ReaderId, RegistrationId},
    sessions::SessionCopies,
    wakes::WakeRegistry,
};

/// The effects of one transaction. Empty by default.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Messages that were accepted.
    pub(crate) accepted: Option<Accepted>,
    /// Messages that were removed.
    pub(crate) removed: Option<Removal>,
    /// Sessions that were ended.
    pub(crate) ended_sessions: Vec<TokenHash>,
}

/// Messages that were accepted in a history, by inbox.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) store_id: StoreId,
    pub(crate) inboxes: HashMap<IdentityKey, ToInbox>,
}

/// Messages that were accepted into one inbox.
#[derive(Debug, Default)]
pub(crate) struct ToInbox {
    /// The devices that read the messages; `None` for the single reader.
    pub(crate) devices: Option<Vec<RegistrationId>>,
    pub(crate) messages: Vec<Queued>,
}

impl ToInbox {
    /// Returns the approximate size of the messages in a queue, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.messages.iter().map(|queued| queued.envelope.cost()).sum()
    }
}

/// Messages that were removed for a reader in a history.
#[derive(Debug)]
pub(crate) struct Removal {
    pub(crate) reader: ReaderId,
    /// The view in which the messages were read.
    pub(crate) view: View,
    pub(crate) store_id: StoreId,
    /// The number of this removal among the reader's removals.
    pub(crate) number: u64,
    /// The lease that ends with the removal.
    pub(crate) lease: Option<LeaseId>,
    pub(crate) seqs: Vec<Seq>,
}

/// The waiting calls and the copies of sessions to which effects are applied. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Applier {
    pub(crate) wakes: WakeRegistry,
    pub(crate) sessions: SessionCopies,
}

impl Applier {
    /// Applies the effects of a transaction that has committed.
    pub(crate) async fn apply(&self, effects: Effects) {
        let Effects { accepted, removed, ended_sessions } = effects;
        if let Some(Accepted { store_id, inboxes }) = accepted {
            self.wakes.push(store_id, inboxes).await;
        }
        if let Some(removal) = removed {
            self.wakes.removed(&removal).await;
        }
        if !ended_sessions.is_empty() {
            self.sessions.ended(&ended_sessions).await;
        }
    }
}
