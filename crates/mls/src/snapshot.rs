//! Reads the state of releases up to 0.1, which was one snapshot sealed by [`crate::vault`], into
//! a database.

use qpq_domain::{ChannelId, IdentityKey, UnixMillis};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{
    client::Client,
    codec::{Malformed, Reader},
    database::{Database, DatabaseError},
    group::Group,
    identity::{Identity, read_username},
    packages::Package,
    receive::day,
    received::Arrival,
    waiting::{self, WaitingMessage},
};

const MAGIC: &[u8; 4] = b"QPQM";
const VERSION: u8 = 1;
const DIGEST_LEN: usize = 32;

/// The error of importing a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    #[error("the saved conversations were written by a newer version: update this client")]
    Newer,
    #[error("the saved conversations are damaged: restore the file from a backup or log in again")]
    Damaged,
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<Malformed> for ImportError {
    fn from(_: Malformed) -> Self {
        Self::Damaged
    }
}

impl Client {
    /// Imports a snapshot into an empty database. `now` becomes the arrival time of messages put
    /// aside, which the snapshot does not contain.
    pub fn import(database: &Database, bytes: &[u8], now: UnixMillis) -> Result<Self, ImportError> {
        let content_len = bytes.len().checked_sub(DIGEST_LEN).ok_or(ImportError::Damaged)?;
        let (content, digest) = bytes.split_at(content_len);
        let mut reader = Reader::new(content);
        if reader.raw(MAGIC.len())? != MAGIC {
            return Err(ImportError::Damaged);
        }
        match reader.array()? {
            [VERSION] => {}
            [0] => return Err(ImportError::Damaged),
            [_] => return Err(ImportError::Newer),
        }
        if Sha256::digest(content).as_slice() != digest {
            return Err(ImportError::Damaged);
        }
        let seed = Zeroizing::new(reader.array()?);
        let identity = Identity::from_seed(&seed);
        if identity.public() != IdentityKey::new(reader.array()?) {
            return Err(ImportError::Damaged);
        }
        let username = read_username(&mut reader)?;
        let client = Self::create(database, identity, username)?;
        for package in reader.list(Package::read)? {
            package.save(database)?;
        }
        let me = client.identity().public();
        for (mut group, welcome) in reader.list(Group::read_legacy)? {
            group.save(database, &me)?;
            if let Some(digest) = welcome {
                database.note_digest(&digest, day(now))?;
            }
        }
        let arrival = Arrival { at: now, channel: ChannelId::DEFAULT };
        for message in reader.list(|reader| WaitingMessage::read_legacy(reader, arrival))? {
            database.note_digest(&Sha256::digest(&message.bytes).into(), day(now))?;
            waiting::add(database, &message)?;
        }
        reader.end()?;
        Ok(client)
    }
}
