//! The directory that holds a server's secrets: readable by its owner alone, each file whole or
//! absent.

pub mod fleet;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

const GROUP_OR_OTHERS: u32 = 0o077;
const OTHERS: u32 = 0o007;

/// A directory that exists.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

/// A secret of fixed length that lives in a file.
#[derive(Clone, Copy, Debug)]
pub struct SecretFile {
    pub name: &'static str,
    /// In bytes.
    pub length: usize,
    /// What a new one in its place would break, as a sentence.
    pub if_lost: &'static str,
}

/// Why a directory or a secret in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error(
        "the data directory {path} cannot be made: {source}. Choose one that you may write to, with --data-dir"
    )]
    Create { path: PathBuf, source: io::Error },
    #[error("{path} cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{path} cannot be written: {source}. Check the directory's owner, its permissions and the space left"
    )]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "{path} is damaged: it has {found} bytes instead of {expected}. Restore it from a backup. {if_lost}"
    )]
    Damaged { path: PathBuf, found: usize, expected: usize, if_lost: &'static str },
    #[error("{path} was removed while the server was starting; start it again")]
    Gone { path: PathBuf },
}

impl DataDir {
    /// Makes the directory, for its owner alone, unless it is there.
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

    /// The secret in `file`, if there is one.
    pub fn read_secret(
        &self,
        file: SecretFile,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DataDirError> {
        self.read(file, GROUP_OR_OTHERS)
    }

    /// As [`Self::read_secret`]; warns if those may read it whom `strangers` has in its mode bits.
    fn read(
        &self,
        file: SecretFile,
        strangers: u32,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DataDirError> {
        let path = self.0.join(file.name);
        let secret = match fs::read(&path) {
            Ok(secret) => Zeroizing::new(secret),
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(DataDirError::Read { path, source }),
        };
        warn_if_shared(&path, strangers);
        if secret.len() == file.length {
            return Ok(Some(secret));
        }
        let SecretFile { length: expected, if_lost, .. } = file;
        Err(DataDirError::Damaged { path, found: secret.len(), expected, if_lost })
    }

    /// The secret in `file`; if there is none, one from `make`, written with mode 0600 and durable
    /// when this returns. Of several processes that make one at a time all get the same.
    pub fn secret(
        &self,
        file: SecretFile,
        make: impl FnOnce() -> Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, DataDirError> {
        if let Some(secret) = self.read_secret(file)? {
            return Ok(secret);
        }
        self.add(file.name, &make())?;
        self.read_secret(file)?.ok_or_else(|| DataDirError::Gone { path: self.0.join(file.name) })
    }

    /// Writes the file `name` for its owner alone, unless there is one. After a crash it is there
    /// whole or not at all.
    pub fn add(&self, name: &str, contents: &[u8]) -> Result<(), DataDirError> {
        let path = self.0.join(name);
        if path.exists() {
            return Ok(());
        }
        write_new(&path, contents).map_err(|source| DataDirError::Write { path, source })
    }

    /// Writes the file `name` for its owner alone, whatever there was before. After a crash it has
    /// the old contents or the new ones, and the new ones once this has returned.
    pub fn replace(&self, name: &str, contents: &[u8]) -> Result<(), DataDirError> {
        let path = self.0.join(name);
        let replaced = write_aside(&path, contents)
            .and_then(|aside| fs::rename(aside, &path))
            .and_then(|()| File::open(&self.0)?.sync_all());
        replaced.map_err(|source| DataDirError::Write { path, source })
    }
}

impl SecretFile {
    /// What tells this secret from another of its kind and says nothing else about it, for as long
    /// as it has more than 128 bits that nobody can guess. The same in every version.
    pub fn fingerprint(&self, secret: &[u8]) -> [u8; 32] {
        let domain =
            Sha256::new().chain_update(b"qpq secret fingerprint v1\0").chain_update(self.name);
        domain.chain_update(b"\0").chain_update(secret).finalize().into()
    }
}

/// Writes a file that only its owner may read, unless one is there. After a crash it is there whole
/// or not at all.
fn write_new(path: &Path, contents: &[u8]) -> io::Result<()> {
    let temporary = write_aside(path, contents)?;
    // A link, because a rename would replace what another process has made since we looked.
    let linked = fs::hard_link(&temporary, path);
    let named = match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => fs::rename(&temporary, path),
        Ok(()) => Ok(()),
    };
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    named?;
    let directory =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// Writes and syncs what is to get the name `path`, under another name in the same directory; that
/// name.
fn write_aside(path: &Path, contents: &[u8]) -> io::Result<PathBuf> {
    let aside = path.with_added_extension(format!("{}.new", std::process::id()));
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    file.write_all(contents)?;
    file.sync_all()?;
    Ok(aside)
}

fn warn_if_shared(path: &Path, strangers: u32) {
    let mode = fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode());
    if mode & strangers != 0 {
        tracing::warn!(
            file = %path.display(),
            mode = format_args!("{:03o}", mode & 0o777),
            "others may read this secret file; take it from them with chmod 600",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SecretFile =
        SecretFile { name: "key.bin", length: 4, if_lost: "Without it all is lost." };

    fn made(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(bytes.to_vec())
    }

    #[test]
    fn a_secret_is_made_once_and_only_its_owner_may_read_it() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path().join("a/b")).unwrap();
        assert_eq!(*dir.secret(KEY, || made(b"abcd")).unwrap(), b"abcd");
        assert_eq!(*dir.secret(KEY, || unreachable!("it is there")).unwrap(), b"abcd");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.path()), 0o700);
        assert_eq!(mode(&dir.path().join("key.bin")), 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_damaged_secret_is_refused_and_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        fs::write(dir.path().join("key.bin"), b"abc").unwrap();
        let error = dir.secret(KEY, || unreachable!("it is there")).unwrap_err().to_string();
        assert!(error.contains("key.bin is damaged: it has 3 bytes instead of 4"), "{error}");
        assert!(error.ends_with("Without it all is lost."), "{error}");
        assert_eq!(fs::read(dir.path().join("key.bin")).unwrap(), b"abc");
    }

    #[test]
    fn a_secret_that_came_meanwhile_is_never_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        let meanwhile = || {
            fs::write(dir.path().join("key.bin"), b"them").unwrap();
            made(b"mine")
        };
        assert_eq!(*dir.secret(KEY, meanwhile).unwrap(), b"them");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn what_a_crash_left_half_written_is_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::create(parent.path()).unwrap();
        let left = dir.path().join(format!("key.bin.{}.new", std::process::id()));
        fs::write(&left, b"a").unwrap();
        assert!(dir.read_secret(KEY).unwrap().is_none());
        assert_eq!(*dir.secret(KEY, || made(b"abcd")).unwrap(), b"abcd");
        assert!(!left.exists());
    }

    #[test]
    fn a_secret_can_be_replaced_and_only_its_owner_may_read_it() {
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
    fn a_fingerprint_is_the_same_in_every_version_and_another_for_every_secret_and_kind() {
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
    fn a_file_in_the_way_of_the_directory_is_named() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("file"), b"").unwrap();
        let error = DataDir::create(parent.path().join("file")).unwrap_err().to_string();
        assert!(error.contains("cannot be made") && error.contains("--data-dir"), "{error}");
    }
}
