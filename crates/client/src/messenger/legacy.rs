//! Imports the state of releases up to 0.1: one encrypted file, `state.vault`.

use qpq_domain::{SessionToken, UnixMillis};
use qpq_mls::database::{Database, DatabaseError};
use zeroize::Zeroize as _;

use super::{
    log::EntryId,
    records::{Corrupt, SavedEntry, SavedOutgoing, SavedPerson, decode},
    state::{LEGACY_CURSOR, State},
};

#[derive(Clone, PartialEq, prost::Message)]
struct Saved {
    #[prost(bytes = "vec", tag = "1")]
    token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    mls: Vec<u8>,
    #[prost(uint64, tag = "3")]
    cursor: u64,
    #[prost(message, repeated, tag = "4")]
    outbox: Vec<SavedOutgoing>,
    #[prost(message, repeated, tag = "5")]
    log: Vec<SavedEntry>,
    #[prost(message, repeated, tag = "6")]
    people: Vec<SavedPerson>,
    #[prost(uint64, tag = "7")]
    next_entry: u64,
}

impl Saved {
    fn wipe(&mut self) {
        self.token.zeroize();
        self.mls.zeroize();
        for entry in &mut self.log {
            entry.text.zeroize();
        }
    }
}

/// Puts the content of a vault into an empty database.
pub(super) fn import(
    database: &Database,
    content: &[u8],
    now: UnixMillis,
) -> Result<(), DatabaseError> {
    let mut saved: Saved = decode(content)?;
    let imported = put(database, &saved, now);
    saved.wipe();
    imported
}

fn put(database: &Database, saved: &Saved, now: UnixMillis) -> Result<(), DatabaseError> {
    let mls = qpq_mls::Client::import(database, &saved.mls, now).map_err(Corrupt::new)?;
    let mut state = State::assemble(database, mls);
    if !saved.token.is_empty() {
        let token = SessionToken::try_from(&saved.token[..]).map_err(Corrupt::new)?;
        state.set_token(Some(&token))?;
    }
    state.set_number(LEGACY_CURSOR, Some(saved.cursor))?;
    for person in &saved.people {
        let (identity, known) = person.restore()?;
        state.people.set(identity, known.username, known.standing)?;
        if let Some(at) = known.compared_at {
            state.people.set_compared(&identity, at)?;
        }
    }
    let mut entries =
        saved.log.iter().map(SavedEntry::restore).collect::<Result<Vec<_>, Corrupt>>()?;
    entries.sort_by_key(|kept| kept.entry.id);
    for kept in &entries {
        state.log.restore(kept)?;
    }
    state.log.skip_to(EntryId(saved.next_entry))?;
    for item in &saved.outbox {
        state.outbox.restore(&item.restore()?)?;
    }
    state.save()
}
