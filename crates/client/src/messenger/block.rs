//! Blocked people, whose messages are refused. The server refuses their messages once it knows of
//! the block. This client acknowledges and drops those that the server has accepted before.
//!
//! A block is saved here first, in one step with the note that the server does not know it. So a
//! block takes effect on this device without a connection, and the server is informed later: by
//! [`Messenger::send_blocks`], which each [`Messenger::receive`] calls.
//!
//! The Welcomes of blocked people are not followed, and messages to groups that blocked people
//! created are dropped. In groups that we were in before, their messages are decrypted, so that the
//! keys stay in step, and then dropped. Their changes of such a group still enter its history: the
//! changes concern all members.

use std::collections::BTreeSet;

use qpq_domain::IdentityKey;
use qpq_mls::database::DatabaseError;
use qpq_proto::{methods, v1};

use super::{
    Messenger,
    decisions::Decision,
    people::Person,
    state::State,
    tables::{BLOCKED, UNSENT_BLOCKS},
};
use crate::error::{CallError, Error};

/// A change that the server does not know yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Block,
    Unblock,
}

impl Change {
    fn encode(self) -> [u8; 1] {
        match self {
            Self::Block => [1],
            Self::Unblock => [0],
        }
    }

    fn decode(bytes: &[u8]) -> Self {
        if bytes == Self::Unblock.encode() { Self::Unblock } else { Self::Block }
    }
}

impl Messenger {
    /// Refuses everything that this person sends from now on, and declines this person's requests.
    ///
    /// Earlier messages stay. Works without a connection; blocking a person twice is not an error.
    /// The server is informed by [`Messenger::send_blocks`].
    pub async fn block(&self, identity: IdentityKey) -> Result<Person, Error> {
        if identity == self.profile().identity {
            return Err(qpq_mls::Error::Yourself.into());
        }
        let person = self
            .store()
            .change(move |state| {
                state.block(&identity)?;
                state.note_block_unsent(&identity, Change::Block)?;
                state.share(&Decision::Blocked(identity))?;
                Ok(state.people.person(&identity)?)
            })
            .await?;
        self.send_decisions().await;
        Ok(person)
    }

    /// Accepts messages of this person again; returns whether the person was blocked. The server is
    /// informed by [`Messenger::send_blocks`].
    ///
    /// Messages sent in between are lost, and so are the groups that this person added us to: the
    /// person has to add us again.
    pub async fn unblock(&self, identity: IdentityKey) -> Result<bool, Error> {
        let was_blocked = self
            .store()
            .change(move |state| {
                let was_blocked = state.unblock(&identity)?;
                if was_blocked {
                    state.note_block_unsent(&identity, Change::Unblock)?;
                    state.share(&Decision::Unblocked(identity))?;
                }
                Ok(was_blocked)
            })
            .await?;
        self.send_decisions().await;
        Ok(was_blocked)
    }

    /// Informs the server of all changes that it does not know yet.
    ///
    /// # Errors
    /// If the server cannot be reached, or refuses a change for now, the changes stay noted for the
    /// next call. A change that the server refuses permanently is not sent again: the block then
    /// holds on the devices of this account alone.
    pub async fn send_blocks(&self) -> Result<(), Error> {
        let unsent = self.store().read(|state| Ok(state.unsent_blocks()?)).await?;
        let mut refused: Option<CallError> = None;
        for (identity, change) in unsent {
            let request = v1::BlockUserRequest {
                identity_key: identity.as_bytes().to_vec().into(),
                unblock: change == Change::Unblock,
                ..Default::default()
            };
            match self.client().call::<methods::BlockUser>(request).await {
                Ok(_) => {}
                // The account is deleted.
                Err(error) if error.is_code("users.not_found") => {}
                Err(error)
                    if error.server().is_none()
                        || error.is_temporary()
                        || error.is_unauthorized() =>
                {
                    return Err(error.into());
                }
                Err(error) => refused = Some(error),
            }
            self.store().change(move |state| Ok(state.note_block_sent(&identity, change)?)).await?;
        }
        refused.map_or(Ok(()), |error| Err(error.into()))
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

    /// Notes a change that the server does not know yet, in place of an earlier one.
    fn note_block_unsent(
        &self,
        identity: &IdentityKey,
        change: Change,
    ) -> Result<(), DatabaseError> {
        let row = unsent_row(identity, change);
        self.database().put(UNSENT_BLOCKS, identity.as_bytes(), None, &row)
    }

    /// Removes the note of a change, unless a later change has replaced it.
    fn note_block_sent(&self, identity: &IdentityKey, change: Change) -> Result<(), DatabaseError> {
        let noted = self.database().get(UNSENT_BLOCKS, identity.as_bytes())?;
        if noted.is_some_and(|row| row[..] == unsent_row(identity, change)[..]) {
            self.database().delete(UNSENT_BLOCKS, identity.as_bytes())?;
        }
        Ok(())
    }

    /// Returns the changes that the server does not know yet.
    fn unsent_blocks(&self) -> Result<Vec<(IdentityKey, Change)>, DatabaseError> {
        let damaged = || DatabaseError::Damaged("an unsent block is cut short".into());
        let rows = self.database().all(UNSENT_BLOCKS)?;
        let change = |row: &[u8]| {
            let (change, key) = row.split_at_checked(1).ok_or_else(damaged)?;
            let key = IdentityKey::try_from(key).map_err(|_| damaged())?;
            Ok((key, Change::decode(change)))
        };
        rows.iter().map(|row| change(&row[..])).collect()
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

fn unsent_row(identity: &IdentityKey, change: Change) -> Vec<u8> {
    [&change.encode()[..], identity.as_bytes()].concat()
}
