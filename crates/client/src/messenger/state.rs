//! The state of a profile within one transaction.

use qpq_domain::{IdentityKey, SessionToken, Username};
use qpq_mls::{
    GroupId,
    database::{Database, DatabaseError},
};

use super::{
    log::{ConversationId, Log},
    outbox::Outbox,
    people::{People, Standing},
    records::Corrupt,
    tables::SETTINGS,
};

const TOKEN: &[u8] = b"session-token";
/// The history that the server's seqs belong to.
const STORE_ID: &[u8] = b"store-id";
/// Present while our KeyPackages on the server must be replaced.
pub(super) const REPLACE_PACKAGES: &[u8] = b"replace-packages";
/// The time at which all of our KeyPackages on the server were last replaced.
pub(super) const PACKAGES_SINCE: &[u8] = b"packages-since";
/// The seq up to which an earlier release processed the inbox, without noting the messages.
pub(super) const LEGACY_CURSOR: &[u8] = b"legacy-cursor";

/// A profile's state within one transaction of its database. Changes are saved before anything that
/// depends on them leaves the machine.
#[derive(Debug)]
pub(crate) struct State {
    database: Database,
    pub(crate) mls: qpq_mls::Client,
    pub(crate) outbox: Outbox,
    pub(crate) log: Log,
    pub(crate) people: People,
}

impl State {
    /// Creates the state of a new account in an empty database.
    pub(crate) fn create(
        database: &Database,
        identity: qpq_mls::Identity,
        username: Username,
    ) -> Result<Self, DatabaseError> {
        let name = username.clone();
        let mls = qpq_mls::Client::create(database, identity, username)?;
        let state = Self::assemble(database, mls);
        state.people.set(state.me(), name, Standing::Own)?;
        state.begin_noting_acquaintances()?;
        Ok(state)
    }

    /// Opens the state for a transaction.
    pub(crate) fn open(database: &Database) -> Result<Self, DatabaseError> {
        Ok(Self::assemble(database, qpq_mls::Client::open(database)?))
    }

    pub(super) fn assemble(database: &Database, mls: qpq_mls::Client) -> Self {
        Self {
            mls,
            outbox: Outbox::new(database),
            log: Log::new(database),
            people: People::new(database),
            database: database.clone(),
        }
    }

    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    /// Writes the changes that are only in memory. Must be called before the transaction ends.
    pub(crate) fn save(&mut self) -> Result<(), DatabaseError> {
        self.mls.save()
    }

    pub(crate) fn me(&self) -> IdentityKey {
        self.mls.identity().public()
    }

    /// Returns the conversation that a group of ours belongs to.
    pub(crate) fn conversation_of(
        &self,
        group: &GroupId,
    ) -> Result<Option<ConversationId>, DatabaseError> {
        let summary = self.mls.group(group)?;
        Ok(summary.map(|summary| ConversationId::of(&summary, &self.me())))
    }

    /// Returns the token of the session.
    pub(crate) fn token(&self) -> Result<Option<SessionToken>, DatabaseError> {
        let Some(bytes) = self.database.get(SETTINGS, TOKEN)? else { return Ok(None) };
        Ok(Some(SessionToken::try_from(&bytes[..]).map_err(Corrupt::new)?))
    }

    pub(crate) fn set_token(&self, token: Option<&SessionToken>) -> Result<(), DatabaseError> {
        match token {
            Some(token) => self.database.put(SETTINGS, TOKEN, None, token.expose()),
            None => self.database.delete(SETTINGS, TOKEN).map(drop),
        }
    }

    /// Notes the history that the server's seqs belong to; returns whether it was another before.
    pub(super) fn is_other_store(&self, store_id: &[u8]) -> Result<bool, DatabaseError> {
        if store_id.is_empty() {
            return Ok(false);
        }
        let before = self.database.get(SETTINGS, STORE_ID)?;
        if before.as_ref().is_some_and(|before| before[..] == *store_id) {
            return Ok(false);
        }
        self.database.put(SETTINGS, STORE_ID, None, store_id)?;
        Ok(before.is_some())
    }

    /// Notes that our KeyPackages on the server are to be replaced.
    pub(super) fn replace_packages(&self) -> Result<(), DatabaseError> {
        self.set_number(REPLACE_PACKAGES, Some(1))
    }

    /// Returns a number among the settings.
    pub(super) fn number(&self, name: &[u8]) -> Result<Option<u64>, DatabaseError> {
        let Some(bytes) = self.database.get(SETTINGS, name)? else { return Ok(None) };
        let bytes = bytes[..].try_into().map_err(Corrupt::new)?;
        Ok(Some(u64::from_be_bytes(bytes)))
    }

    pub(super) fn set_number(&self, name: &[u8], value: Option<u64>) -> Result<(), DatabaseError> {
        match value {
            Some(value) => self.database.put(SETTINGS, name, None, &value.to_be_bytes()),
            None => self.database.delete(SETTINGS, name).map(drop),
        }
    }
}
