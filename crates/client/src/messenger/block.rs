//! Blocked people, whose messages are refused. The server still accepts their messages; this client
//! acknowledges and drops them.
//!
//! The Welcomes of blocked people are not followed, and messages to groups that blocked people
//! created are dropped. In groups that we were in before, their messages are decrypted, so that the
//! keys stay in step, and then dropped. Their changes of such a group still enter its history: the
//! changes concern all members.

use std::collections::BTreeSet;

use qpq_domain::IdentityKey;
use qpq_mls::database::DatabaseError;

use super::{Messenger, decisions::Decision, people::Person, state::State, tables::BLOCKED};
use crate::error::Error;

impl Messenger {
    /// Refuses everything that this person sends from now on, and declines this person's requests.
    ///
    /// Earlier messages stay. Works without a connection; blocking a person twice is not an error.
    pub async fn block(&self, identity: IdentityKey) -> Result<Person, Error> {
        if identity == self.profile().identity {
            return Err(qpq_mls::Error::Yourself.into());
        }
        let person = self
            .store()
            .change(move |state| {
                state.block(&identity)?;
                state.share(&Decision::Blocked(identity))?;
                Ok(state.people.person(&identity)?)
            })
            .await?;
        self.send_decisions().await;
        Ok(person)
    }

    /// Accepts messages of this person again; returns whether the person was blocked.
    ///
    /// Messages sent in between are lost, and so are the groups that this person added us to: the
    /// person has to add us again.
    pub async fn unblock(&self, identity: IdentityKey) -> Result<bool, Error> {
        let was_blocked = self
            .store()
            .change(move |state| {
                let was_blocked = state.unblock(&identity)?;
                if was_blocked {
                    state.share(&Decision::Unblocked(identity))?;
                }
                Ok(was_blocked)
            })
            .await?;
        self.send_decisions().await;
        Ok(was_blocked)
    }

    /// Returns everyone whose messages are refused.
    pub async fn blocked(&self) -> Result<Vec<Person>, Error> {
        self.store()
            .read(|state| {
                let blocked = state.blocked()?;
                blocked.iter().map(|key| Ok(state.people.person(key)?)).collect()
            })
            .await
    }
}

impl State {
    /// Refuses everything that a person sends, on this device.
    pub(super) fn block(&mut self, identity: &IdentityKey) -> Result<(), Error> {
        self.database().put(BLOCKED, identity.as_bytes(), None, identity.as_bytes())?;
        self.forget_questions(identity)?;
        self.forget_stranger(identity)?;
        self.mls.decline_all(identity)?;
        Ok(())
    }

    /// Ends [`State::block`]. Returns whether the person was blocked.
    pub(super) fn unblock(&self, identity: &IdentityKey) -> Result<bool, DatabaseError> {
        self.database().delete(BLOCKED, identity.as_bytes())
    }

    /// Returns the keys of everyone whose messages are refused.
    pub(super) fn blocked(&self) -> Result<BTreeSet<IdentityKey>, DatabaseError> {
        let damaged = |_| DatabaseError::Damaged("a blocked key is cut short".into());
        let rows = self.database().all(BLOCKED)?;
        rows.iter().map(|row| IdentityKey::try_from(&row[..]).map_err(damaged)).collect()
    }

    /// Returns whether this person's messages are refused.
    pub(super) fn is_blocked(&self, identity: &IdentityKey) -> Result<bool, DatabaseError> {
        Ok(self.database().get(BLOCKED, identity.as_bytes())?.is_some())
    }

    /// Fails if this person's messages are refused: an answer would not be read.
    pub(super) fn check_not_blocked(&self, identity: &IdentityKey) -> Result<(), Error> {
        if self.is_blocked(identity)? {
            return Err(Error::Blocked(self.people.person(identity)?.username));
        }
        Ok(())
    }
}
