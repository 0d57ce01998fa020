//! A client's state as bytes and back: one snapshot, the same bytes for the same state, to be
//! sealed by [`crate::vault`].
//!
//! A SHA-256 at the end finds damage where the bytes were kept without a vault: openmls panics on a
//! store that it did not write.

use qpq_domain::IdentityKey;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{
    client::Client,
    codec::{Malformed, Reader, Writer},
    group::{Group, read_username},
    identity::Identity,
    packages::Packages,
    waiting::Waiting,
};

const MAGIC: &[u8; 4] = b"QPQM";
const VERSION: u8 = 1;
const DIGEST_LEN: usize = 32;

/// The bytes are not a state that this version wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CorruptState {
    #[error("the saved conversations were written by a newer version: update this client")]
    Newer,
    #[error("the saved conversations are damaged: restore the file from a backup or log in anew")]
    Damaged,
}

impl From<Malformed> for CorruptState {
    fn from(_: Malformed) -> Self {
        Self::Damaged
    }
}

impl Client {
    /// Everything, secret keys included.
    pub fn export_state(&self) -> Zeroizing<Vec<u8>> {
        let name = self.username.as_str().as_bytes();
        let groups: usize = self.groups.values().map(Group::written_len).sum();
        let len = 5 + 32 + 32 + 4 + name.len() + self.packages.written_len() + 8 + groups;
        let mut writer = Writer::with_capacity(len + self.waiting.written_len() + DIGEST_LEN);
        writer.raw(MAGIC);
        writer.raw(&[VERSION]);
        writer.raw(self.identity.seed());
        writer.raw(self.identity.public().as_bytes());
        writer.bytes(name);
        self.packages.write(&mut writer);
        writer.count(self.groups.len());
        self.groups.values().for_each(|group| group.write(&mut writer));
        self.waiting.write(&mut writer);
        let digest = Sha256::digest(writer.written());
        writer.raw(&digest);
        writer.finish()
    }

    /// The client that [`Client::export_state`] saved.
    pub fn import_state(bytes: &[u8]) -> Result<Self, CorruptState> {
        let content_len = bytes.len().checked_sub(DIGEST_LEN).ok_or(CorruptState::Damaged)?;
        let (content, digest) = bytes.split_at(content_len);
        let mut reader = Reader::new(content);
        if reader.raw(MAGIC.len())? != MAGIC {
            return Err(CorruptState::Damaged);
        }
        match reader.array()? {
            [VERSION] => {}
            [0] => return Err(CorruptState::Damaged),
            [_] => return Err(CorruptState::Newer),
        }
        if Sha256::digest(content).as_slice() != digest {
            return Err(CorruptState::Damaged);
        }
        let seed = Zeroizing::new(reader.array()?);
        let identity = Identity::from_seed(&seed);
        if identity.public() != IdentityKey::new(reader.array()?) {
            return Err(CorruptState::Damaged);
        }
        let username = read_username(&mut reader)?;
        let packages = Packages::read(&mut reader)?;
        let groups =
            reader.list(Group::read)?.into_iter().map(|group| (group.id(), group)).collect();
        let waiting = Waiting::read(&mut reader)?;
        reader.end()?;
        Ok(Self { identity, username, packages, groups, waiting })
    }
}
