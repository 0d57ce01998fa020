//! A profile on disk: one account of one person on one server.
//!
//! | file | contents |
//! |---|---|
//! | `profile.json` | [`Profile`], not encrypted: account, server, and the server's proof of identity |
//! | `state.db` (`-wal`, `-shm`) | all secrets, sealed value by value |
//! | `state.vault` | the state of earlier releases; imported and removed at the first unlock |
//! | `lock` | shared by the processes that use the profile; exclusive during a registration |
//! | `inbox.lock`, `outbox.lock` | held by the process that reads the inbox, or sends |
//! | `changes.lock` | held by the process that changes groups |

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use qpq_domain::{DeviceId, IdentityKey, Username};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::{
    error::ProfileError,
    options::{Options, Trust},
};

/// The maximum wait for another process that uses a profile: the duration of a short command.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(25);

/// The data of a profile that can be read without a password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The account's name.
    #[serde(with = "username_text")]
    pub username: Username,
    /// The server's address as given: `host` or `host:port`.
    pub server: String,
    /// The proof of identity that the server must have.
    pub trust: Trust,
    /// The account's identity key.
    #[serde(with = "identity_hex")]
    pub identity: IdentityKey,
    /// The state of the account's registration.
    pub status: ProfileStatus,
    /// The device of this profile; absent while the account has no devices.
    #[serde(with = "device_hex", default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceId>,
}

/// The state of an account's registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProfileStatus {
    /// The registration has begun, and may or may not have reached the server.
    Registering,
    /// The registration is complete.
    Registered,
}

impl Profile {
    /// Reads the profile in `dir`. Takes no lock: the file is replaced as a whole.
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

    /// Returns the options for a connection to the profile's server.
    pub fn options(&self) -> Options {
        Options::new(&self.server, self.trust.clone())
    }

    /// Saves another address of the server, or another trust: the server has moved, or its operator
    /// has confirmed its new certificate.
    pub async fn relocate(dir: &Path, server: &str, trust: Trust) -> Result<Self, ProfileError> {
        let before = Self::read(dir)?;
        let _in_use = enter(dir).await?;
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

/// Returns the path of a profile's state.
pub(crate) fn database_path(dir: &Path) -> PathBuf {
    dir.join("state.db")
}

/// Returns the path at which earlier releases kept a profile's state.
pub(crate) fn vault_path(dir: &Path) -> PathBuf {
    dir.join("state.vault")
}

/// A directory of a profile that this process uses until the value is dropped.
#[derive(Debug)]
pub(crate) struct InUse {
    pub(crate) dir: PathBuf,
    file: File,
}

impl InUse {
    /// Lets other processes use the profile too.
    pub(crate) fn share(&self) -> Result<(), ProfileError> {
        self.file
            .lock_shared()
            .map_err(|source| ProfileError::Io { path: self.dir.join("lock"), source })
    }
}

/// Creates the directory if it is missing (mode 0700), and locks it for this process alone.
pub(crate) async fn lock(dir: &Path) -> Result<InUse, ProfileError> {
    acquire(dir, File::try_lock).await
}

/// Locks the directory of a profile: shared with other processes or, if its state has to be
/// imported, alone until [`InUse::share`].
pub(crate) async fn enter(dir: &Path) -> Result<InUse, ProfileError> {
    if database_path(dir).exists() {
        acquire(dir, File::try_lock_shared).await
    } else {
        lock(dir).await
    }
}

async fn acquire(
    dir: &Path,
    try_lock: impl Fn(&File) -> Result<(), TryLockError>,
) -> Result<InUse, ProfileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| ProfileError::Io { path: dir.to_owned(), source })?;
    let path = dir.join("lock");
    match wait_for(&path, try_lock, LOCK_TIMEOUT).await {
        Ok(Some(file)) => Ok(InUse { dir: dir.to_owned(), file }),
        Ok(None) => Err(ProfileError::InUse(dir.to_owned())),
        Err(source) => Err(ProfileError::Io { path, source }),
    }
}

/// Work that only one process of a profile does at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    ReadInbox,
    SendOutbox,
    ChangeGroups,
}

/// The right to do a [`Task`], until the value is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _file: File,
}

/// Waits for the turn to do a task; `None` if another process has it for all of `patience`.
pub(crate) async fn turn(
    dir: &Path,
    task: Task,
    patience: Duration,
) -> Result<Option<Turn>, ProfileError> {
    let path = dir.join(match task {
        Task::ReadInbox => "inbox.lock",
        Task::SendOutbox => "outbox.lock",
        Task::ChangeGroups => "changes.lock",
    });
    match wait_for(&path, File::try_lock, patience).await {
        Ok(file) => Ok(file.map(|file| Turn { _file: file })),
        Err(source) => Err(ProfileError::Io { path, source }),
    }
}

/// Locks a file; `None` if others have it locked for all of `patience`.
async fn wait_for(
    path: &Path,
    try_lock: impl Fn(&File) -> Result<(), TryLockError>,
    patience: Duration,
) -> io::Result<Option<File>> {
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let until = Instant::now() + patience;
    loop {
        match try_lock(&file) {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) if Instant::now() < until => sleep(LOCK_RETRY).await,
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), ProfileError> {
    qpq_durable_file::replace(path, bytes, 0o600)
        .map_err(|source| ProfileError::Io { path: path.to_owned(), source })
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

mod device_hex {
    use qpq_domain::DeviceId;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        device: &Option<DeviceId>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match device {
            Some(device) => to.serialize_str(&hex::encode(device.as_bytes())),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<DeviceId>, D::Error> {
        let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
        let bytes = hex::decode(text).map_err(D::Error::custom)?;
        DeviceId::try_from(&bytes[..]).map(Some).map_err(D::Error::custom)
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
            status: ProfileStatus::Registered,
            device: Some(DeviceId::new([0xcd; 16])),
        }
    }

    #[test]
    fn a_written_profile_is_read_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Profile::read(dir.path()), Err(ProfileError::Missing(_))));
        profile().write(dir.path()).unwrap();
        assert_eq!(Profile::read(dir.path()).unwrap(), profile());
        fs::write(dir.path().join("profile.json"), "{").unwrap();
        assert!(matches!(Profile::read(dir.path()), Err(ProfileError::Damaged { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_profile_is_shared_unless_a_process_has_locked_it() {
        let dir = tempfile::tempdir().unwrap();
        let alone = lock(dir.path()).await.unwrap();
        assert!(matches!(enter(dir.path()).await, Err(ProfileError::InUse(_))));
        fs::write(database_path(dir.path()), "").unwrap();
        alone.share().unwrap();
        let other = enter(dir.path()).await.unwrap();
        assert!(matches!(lock(dir.path()).await, Err(ProfileError::InUse(_))));
        drop((alone, other));
        lock(dir.path()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_a_turn_ends_after_the_given_time() {
        let dir = tempfile::tempdir().unwrap();
        let wait = |task| turn(dir.path(), task, Duration::from_secs(1));
        let held = wait(Task::ReadInbox).await.unwrap().unwrap();
        assert!(wait(Task::ReadInbox).await.unwrap().is_none());
        assert!(wait(Task::SendOutbox).await.unwrap().is_some());
        drop(held);
        assert!(wait(Task::ReadInbox).await.unwrap().is_some());
    }
}
