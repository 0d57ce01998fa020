//! A profile on disk: one account of one person on one server.
//!
//! | file | what |
//! |---|---|
//! | `profile.json` | [`Profile`], in the open: who, where, and by what the server is known |
//! | `state.vault` | everything secret, encrypted |
//! | `lock` | held while a process uses the profile, since two would fork the encryption state |

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use qpq_domain::{IdentityKey, Username};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::{
    error::ProfileError,
    options::{Options, Trust},
};

/// How long to wait for another process to let go of a profile: as long as a short command takes.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(25);

/// What is known of a profile without its password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    #[serde(with = "username_text")]
    pub username: Username,
    /// As given: `host` or `host:port`.
    pub server: String,
    pub trust: Trust,
    #[serde(with = "identity_hex")]
    pub identity: IdentityKey,
    pub status: Status,
}

/// How far the account's registration got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Begun; it may or may not have reached the server.
    Registering,
    Registered,
}

impl Profile {
    /// Reads the profile in `dir`. Takes no lock: another process may be using it.
    pub fn read(dir: &Path) -> Result<Self, ProfileError> {
        let path = dir.join("profile.json");
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ProfileError::Missing(dir.to_owned()));
            }
            read => read.map_err(|source| ProfileError::Io { path: path.clone(), source })?,
        };
        serde_json::from_slice(&bytes)
            .map_err(|error| ProfileError::Damaged { path, reason: error.to_string() })
    }

    /// How to connect to the profile's server.
    pub fn options(&self) -> Options {
        Options::new(&self.server, self.trust.clone())
    }

    /// Notes another address of the server, or another way to know it: it moved, or its operator
    /// confirmed its new certificate.
    pub async fn relocate(dir: &Path, server: &str, trust: Trust) -> Result<Self, ProfileError> {
        let before = Self::read(dir)?;
        let _locked = lock(dir).await?;
        let profile = Self { server: server.to_owned(), trust, ..before };
        profile.write(dir)?;
        Ok(profile)
    }

    /// Replaces the profile in `dir`, whole or not at all.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), ProfileError> {
        let mut json = serde_json::to_vec_pretty(self).expect("strings and enums");
        json.push(b'\n');
        replace(&dir.join("profile.json"), &json)
    }
}

/// Where a profile's encrypted state is.
pub(crate) fn vault_path(dir: &Path) -> PathBuf {
    dir.join("state.vault")
}

/// A profile's directory, ours alone until dropped.
#[derive(Debug)]
pub(crate) struct Locked {
    pub(crate) dir: PathBuf,
    _file: File,
}

/// Makes the directory if it is missing (mode 0700), and locks it.
pub(crate) async fn lock(dir: &Path) -> Result<Locked, ProfileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| ProfileError::Io { path: dir.to_owned(), source })?;
    let path = dir.join("lock");
    let in_lock = |source| ProfileError::Io { path: path.clone(), source };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(in_lock)?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Locked { dir: dir.to_owned(), _file: file }),
            Err(TryLockError::WouldBlock) if Instant::now() < until => sleep(LOCK_RETRY).await,
            Err(TryLockError::WouldBlock) => return Err(ProfileError::InUse(dir.to_owned())),
            Err(TryLockError::Error(source)) => return Err(in_lock(source)),
        }
    }
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), ProfileError> {
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| ProfileError::Io { path: path.to_owned(), source })
}

mod username_text {
    use qpq_domain::Username;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(username: &Username, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(username.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Username, D::Error> {
        Username::parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

mod identity_hex {
    use qpq_domain::IdentityKey;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        identity: &IdentityKey,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_str(identity)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<IdentityKey, D::Error> {
        let bytes = hex::decode(String::deserialize(from)?).map_err(D::Error::custom)?;
        IdentityKey::try_from(&bytes[..]).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        Profile {
            username: Username::parse("alice").unwrap(),
            server: "localhost:5001".into(),
            trust: Trust::System,
            identity: IdentityKey::new([0xab; 32]),
            status: Status::Registered,
        }
    }

    #[test]
    fn a_profile_comes_back_as_written_and_rubbish_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Profile::read(dir.path()), Err(ProfileError::Missing(_))));
        profile().write(dir.path()).unwrap();
        assert_eq!(Profile::read(dir.path()).unwrap(), profile());
        fs::write(dir.path().join("profile.json"), "{").unwrap();
        assert!(matches!(Profile::read(dir.path()), Err(ProfileError::Damaged { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_profile_in_use_is_waited_for_a_little_and_then_refused() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).await.unwrap();
        assert!(matches!(lock(dir.path()).await, Err(ProfileError::InUse(_))));
        drop(held);
        lock(dir.path()).await.unwrap();
    }
}
