//! A client's state as bytes and back: one snapshot, the same bytes for the same state, to be sealed by [`crate::vault`].

use qpq_domain::IdentityKey;
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
        let mut writer = Writer::with_capacity(len + self.waiting.written_len());
        writer.raw(MAGIC);
        writer.raw(&[VERSION]);
        writer.raw(self.identity.seed());
        writer.raw(self.identity.public().as_bytes());
        writer.bytes(name);
        self.packages.write(&mut writer);
        writer.count(self.groups.len());
        self.groups.values().for_each(|group| group.write(&mut writer));
        self.waiting.write(&mut writer);
        writer.finish()
    }

    /// The client that [`Client::export_state`] saved.
    pub fn import_state(bytes: &[u8]) -> Result<Self, CorruptState> {
        let mut reader = Reader::new(bytes);
        if reader.raw(MAGIC.len())? != MAGIC {
            return Err(CorruptState::Damaged);
        }
        match reader.array()? {
            [VERSION] => {}
            [0] => return Err(CorruptState::Damaged),
            [_] => return Err(CorruptState::Newer),
        }
        let seed = Zeroizing::new(reader.array()?);
        let identity = Identity::from_seed(&seed);
        if identity.public() != IdentityKey::new(reader.array()?) {
            return Err(CorruptState::Damaged);
        }
        let username = read_username(&mut reader)?;
        let packages = Packages::read(&mut reader)?;
        let groups = reader.list(Group::read)?.into_iter().map(|group| (group.id(), group)).collect();
        let waiting = Waiting::read(&mut reader)?;
        reader.end()?;
        Ok(Self { identity, username, packages, groups, waiting })
    }
}
