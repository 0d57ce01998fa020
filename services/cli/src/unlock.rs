//! The key that opens a profile, kept between `qpq login` and `qpq logout`: in a file of a memory
//! file system, which only its owner can read and which does not survive a reboot.
//!
//! Places, in this order: `$XDG_RUNTIME_DIR/qpq`, `/run/user/UID/qpq`, `/dev/shm/qpq-UID`. A place
//! that is not in memory, or that another user could read or has created, is not used. Without a
//! place, commands ask for the password each time.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Read as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::OFlag,
    sys::statfs::{FsType, TMPFS_MAGIC, statfs},
    unistd::Uid,
};
use qpq_client::VaultKey;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::error::CliError;

/// The length of key and salt, in bytes.
const LEN: usize = 48;
/// The type that `statfs` returns for ramfs; the nix crate has no constant for it.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The place where keys are kept, if there is one.
#[derive(Debug, Clone)]
pub(crate) struct Keyring {
    dir: Option<PathBuf>,
}

impl Keyring {
    /// Finds the place. `runtime_dir` is `$XDG_RUNTIME_DIR`.
    pub(crate) fn find(runtime_dir: Option<&OsStr>) -> Self {
        let uid = Uid::current();
        let session = runtime_dir.map(PathBuf::from).filter(|dir| dir.is_absolute());
        let places = [
            session.map(|dir| (dir.clone(), dir.join("qpq"))),
            Some(PathBuf::from(format!("/run/user/{uid}")))
                .map(|dir| (dir.clone(), dir.join("qpq"))),
            Some((PathBuf::from("/dev/shm"), PathBuf::from(format!("/dev/shm/qpq-{uid}")))),
        ];
        let usable = places.into_iter().flatten().find(|(parent, dir)| match usable(parent, dir) {
            Ok(()) => true,
            Err(why) => {
                tracing::debug!(place = %dir.display(), %why, "no place for keys");
                false
            }
        });
        Self { dir: usable.map(|(_, dir)| dir) }
    }

    /// Returns whether there is a place for keys.
    pub(crate) fn exists(&self) -> bool {
        self.dir.is_some()
    }

    /// Returns the key of a profile, if one is kept.
    pub(crate) fn get(&self, profile: &Path) -> Option<VaultKey> {
        let path = self.path(profile)?;
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&path)
            .ok()?;
        let metadata = file.metadata().ok()?;
        if metadata.uid() != Uid::current().as_raw() || metadata.mode() & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "the kept key is not used: others can read it");
            return None;
        }
        let mut bytes = Zeroizing::new([0; LEN]);
        file.read_exact(&mut *bytes).ok()?;
        Some(VaultKey::from_bytes(&bytes))
    }

    /// Keeps the key of a profile; returns whether there is a place for it.
    pub(crate) fn put(&self, profile: &Path, key: &VaultKey) -> Result<Kept, CliError> {
        let (Some(dir), Some(path)) = (&self.dir, self.path(profile)) else { return Ok(Kept::No) };
        qpq_durable_file::replace(&path, &*key.to_bytes(), 0o600).map(|()| Kept::Yes).map_err(
            |error| CliError::io(format_args!("cannot keep the key in {}", dir.display()), &error),
        )
    }

    /// Forgets the key of a profile.
    pub(crate) fn remove(&self, profile: &Path) -> Result<(), CliError> {
        let Some(path) = self.path(profile) else { return Ok(()) };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CliError::io(format_args!("cannot remove {}", path.display()), &error))
            }
            _ => Ok(()),
        }
    }

    /// Returns the path of a profile's key: one file for each profile directory.
    fn path(&self, profile: &Path) -> Option<PathBuf> {
        let dir = self.dir.as_ref()?;
        let full = fs::canonicalize(profile).unwrap_or_else(|_| profile.to_owned());
        let name = hex::encode(&Sha256::digest(full.as_os_str().as_bytes())[..16]);
        Some(dir.join(format!("{name}.key")))
    }
}

/// Whether a key was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    Yes,
    No,
}

/// Creates `dir` under `parent` if it is missing, and checks that it is ours alone and in memory.
fn usable(parent: &Path, dir: &Path) -> Result<(), String> {
    let kind = statfs(parent).map_err(|error| error.to_string())?.filesystem_type();
    if kind != TMPFS_MAGIC && kind != RAMFS_MAGIC {
        return Err("it is not in memory".to_owned());
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.to_string()),
        _ => {}
    }
    let metadata = fs::symlink_metadata(dir).map_err(|error| error.to_string())?;
    let is_ours = metadata.is_dir()
        && metadata.uid() == Uid::current().as_raw()
        && metadata.mode() & 0o077 == 0;
    if is_ours { Ok(()) } else { Err("it is not a directory of ours alone".to_owned()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// Creates a directory in memory, as the places are.
    fn memory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").expect("tests need /dev/shm")
    }

    fn key(byte: u8) -> VaultKey {
        VaultKey::from_bytes(&[byte; LEN])
    }

    #[test]
    fn a_key_is_kept_only_for_its_owner_until_it_is_removed() {
        let (memory, profiles) = (memory(), tempfile::tempdir().unwrap());
        let keyring = Keyring::find(Some(memory.path().as_os_str()));
        let (alice, bob) = (profiles.path().join("alice"), profiles.path().join("bob"));
        assert!(keyring.get(&alice).is_none());
        assert_eq!(keyring.put(&alice, &key(1)).unwrap(), Kept::Yes);
        assert_eq!(keyring.put(&alice, &key(2)).unwrap(), Kept::Yes);
        assert_eq!(*keyring.get(&alice).unwrap().to_bytes(), [2; LEN]);
        assert!(keyring.get(&bob).is_none());

        let dir = memory.path().join("qpq");
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o700);
        let files: Vec<_> =
            fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "no other file is left");
        assert_eq!(fs::metadata(&files[0]).unwrap().mode() & 0o7777, 0o600);

        keyring.remove(&alice).unwrap();
        keyring.remove(&alice).unwrap();
        assert!(keyring.get(&alice).is_none());
    }

    #[test]
    fn a_key_that_others_can_read_and_a_link_are_not_used() {
        let memory = memory();
        let keyring = Keyring::find(Some(memory.path().as_os_str()));
        let profile = memory.path().join("alice");
        keyring.put(&profile, &key(1)).unwrap();
        let path = keyring.path(&profile).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(keyring.get(&profile).is_none());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(keyring.get(&profile).is_some());
        let elsewhere = memory.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(keyring.get(&profile).is_none());
    }

    #[test]
    fn a_place_that_is_on_a_disk_or_open_to_others_is_refused() {
        let memory = memory();
        let place = memory.path().join("qpq");
        assert_eq!(usable(memory.path(), &place), Ok(()));
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(usable(memory.path(), &place).is_err());
        fs::remove_dir(&place).unwrap();
        symlink("/tmp", &place).unwrap();
        assert!(usable(memory.path(), &place).is_err());
        assert!(usable(Path::new("/proc"), Path::new("/proc/qpq")).is_err(), "not in memory");
        let nowhere = Keyring { dir: None };
        assert_eq!(nowhere.put(&place, &key(1)).unwrap(), Kept::No);
        assert!(nowhere.get(&place).is_none() && !nowhere.exists());
    }
}
