//! The directory with a server's secrets, readable by its owner alone. Each file is complete or
//! absent.

pub mod cluster;

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use qpq_durable_file::{self as durable_file, Created};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

const FILE_MODE: u32 = 0o600;
const GROUP_OR_OTHERS: u32 = 0o077;
const OTHERS: u32 = 0o007;

/// An existing directory for secrets.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

/// The name and the length of a secret in a file.
#[derive(Clone, Copy, Debug)]
pub struct SecretFile {
    pub name: &'static str,
    /// The length in bytes.
    pub length: usize,
    /// The damage if the secret is replaced by another one, as a sentence for people.
    pub if_lost: &'static str,
}

/// The reason why a directory or a secret in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error(
        "cannot create the data directory {path}: {source}. Choose a directory that you may \
         write to, with --data-dir"
    )]
    Create { path: PathBuf, source: io::Error },
    #[error("{path} cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{path} cannot be written: {source}. Check the directory's owner, its permissions and the \
         free space"
    )]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "{path} is damaged: it has {found} bytes instead of {expected}. Restore it from a backup. \
         {if_lost}"
    )]
    Damaged { path: PathBuf, found: usize, expected: usize, if_lost: &'static str },
    #[error("{path} was removed while the server was starting; start it again")]
    Missing { path: PathBuf },
}

impl DataDir {
    /// Creates the directory with mode 0700, unless it exists.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, DataDirError> {
        let path = path.into();
        match DirBuilder::new().recursive(true).mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(DataDirError::Create { path, source }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the secret in `file`, if the file exists.
    pub fn read_secret(
        &self,
        file: SecretFile,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DataDirError> {
        self.read(file, GROUP_OR_OTHERS)
    }

    /// Returns the secret contents of the file `name`, which may have any length, if the file
    /// exists.
    pub fn read_any(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, DataDirError> {
        self.read_with_mode(name, GROUP_OR_OTHERS)
    }

    fn read(
        &self,
        file: SecretFile,
        forbidden_mode: u32,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DataDirError> {
        let Some(secret) = self.read_with_mode(file.name, forbidden_mode)? else { return Ok(None) };
        if secret.len() == file.length {
            return Ok(Some(secret));
        }
        let (path, found) = (self.0.join(file.name), secret.len());
        let SecretFile { length: expected, if_lost, .. } = file;
        Err(DataDirError::Damaged { path, found, expected, if_lost })
    }

    /// Reads a file. Logs a warning if the file's mode has one of the bits of `forbidden_mode`.
    fn read_with_mode(
        &self,
        name: &str,
        forbidden_mode: u32,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DataDirError> {
        let path = self.0.join(name);
        let secret = match fs::read(&path) {
            Ok(secret) => Zeroizing::new(secret),
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(DataDirError::Read { path, source }),
        };
        warn_if_shared(&path, forbidden_mode);
        Ok(Some(secret))
    }

    /// Returns the secret in `file`. If there is none, writes one from `create` with mode 0600,
    /// durable before this returns. Concurrent processes get the same secret.
    pub fn secret(
        &self,
        file: SecretFile,
        create: impl FnOnce() -> Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, DataDirError> {
        if let Some(secret) = self.read_secret(file)? {
            return Ok(secret);
        }
        self.add(file.name, &create())?;
        self.read_secret(file)?
            .ok_or_else(|| DataDirError::Missing { path: self.0.join(file.name) })
    }

    /// Writes the file `name` with mode 0600, unless it exists. After a crash the file is complete
    /// or absent.
    pub fn add(&self, name: &str, contents: &[u8]) -> Result<(), DataDirError> {
        let path = self.0.join(name);
        if path.exists() {
            return Ok(());
        }
        match durable_file::create(&path, contents, FILE_MODE) {
            // Another process may have created it meanwhile.
            Ok(Created::New | Created::Exists) => Ok(()),
            Err(source) => Err(DataDirError::Write { path, source }),
        }
    }

    /// Writes or replaces the file `name` with mode 0600, durable before this returns. After a
    /// crash during the call the file has the old contents or the new ones.
    pub fn replace(&self, name: &str, contents: &[u8]) -> Result<(), DataDirError> {
        let path = self.0.join(name);
        durable_file::replace(&path, contents, FILE_MODE)
            .map_err(|source| DataDirError::Write { path, source })
    }
}

impl SecretFile {
    /// Returns a hash that identifies this secret among others of its kind, the same in every
    /// version. The hash reveals nothing else of a secret with at least 128 bits of entropy.
    pub fn fingerprint(&self, secret: &[u8]) -> [u8; 32] {
        let domain =
            Sha256::new().chain_update(b"qpq secret fingerprint v1\0").chain_update(self.name);
        domain.chain_update(b"\0").chain_update(secret).finalize().into()
    }
}

fn warn_if_shared(path: &Path, forbidden_mode: u32) {
    let mode = fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode());
    if mode & forbidden_mode != 0 {
        tracing::warn!(
            file = %path.display(),
            mode = format_args!("{:03o}", mode & 0o777),
            "secret file is readable by others: run chmod 600 on it",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SecretFile =
        SecretFile { name: "key.bin", length: 4, if_lost: "Without it all is lost." };

    fn secret_of(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(bytes.to_vec())
    }

    #[test]
    fn a_secret_is_created_once_with_mode_0600() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path().join("a/b")).unwrap();
        assert_eq!(*dir.secret(KEY, || secret_of(b"abcd")).unwrap(), b"abcd");
        assert_eq!(*dir.secret(KEY, || unreachable!("the secret exists")).unwrap(), b"abcd");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.path()), 0o700);
        assert_eq!(mode(&dir.path().join("key.bin")), 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_damaged_secret_is_refused_and_not_overwritten() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        fs::write(dir.path().join("key.bin"), b"abc").unwrap();
        let error = dir.secret(KEY, || unreachable!("the secret exists")).unwrap_err().to_string();
        assert!(error.contains("key.bin is damaged: it has 3 bytes instead of 4"), "{error}");
        assert!(error.ends_with("Without it all is lost."), "{error}");
        assert_eq!(fs::read(dir.path().join("key.bin")).unwrap(), b"abc");
    }

    #[test]
    fn a_secret_created_concurrently_is_not_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        let meanwhile = || {
            fs::write(dir.path().join("key.bin"), b"them").unwrap();
            secret_of(b"mine")
        };
        assert_eq!(*dir.secret(KEY, meanwhile).unwrap(), b"them");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_temporary_file_left_by_a_crash_is_ignored() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        for number in 0..100 {
            let left = format!("key.bin.{}.{number}.new", std::process::id());
            fs::write(dir.path().join(left), b"a").unwrap();
        }
        assert!(dir.read_secret(KEY).unwrap().is_none());
        assert_eq!(*dir.secret(KEY, || secret_of(b"abcd")).unwrap(), b"abcd");
    }

    #[test]
    fn a_replaced_secret_has_mode_0600() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        let path = dir.path().join("key.bin");
        fs::write(&path, b"old!").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        dir.replace("key.bin", b"new!").unwrap();
        assert_eq!(*dir.read_secret(KEY).unwrap().unwrap(), b"new!");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_fingerprint_is_stable_and_differs_between_secrets_and_kinds() {
        let print = KEY.fingerprint(b"abcd");
        let expected = "e5584ed77b2d263c";
        assert_eq!(
            print[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            expected
        );
        assert_ne!(print, KEY.fingerprint(b"abce"));
        assert_ne!(print, SecretFile { name: "other", ..KEY }.fingerprint(b"abcd"));
    }

    #[test]
    fn a_file_in_place_of_the_directory_is_an_error_that_names_the_flag() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("file"), b"").unwrap();
        let error = DataDir::create(parent.path().join("file")).unwrap_err().to_string();
        assert!(error.contains("cannot create") && error.contains("--data-dir"), "{error}");
    }
}
