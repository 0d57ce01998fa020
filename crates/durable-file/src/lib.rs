//! Durable files: complete or absent after a crash, and on disk once a function has returned.
//!
//! All crates that store a file use this one: the server for its secrets, `qpq-admin` for backups,
//! the client for its profile. A file is written under a temporary name in the directory of its
//! target, synced, and renamed to its target in one step. Then the directory is synced. Without the
//! first sync, a crash may leave an empty file; without the second, the old file.
//!
//! A process that is killed leaves its temporary file, `TARGET.PID.NUMBER.new`. Nothing reads it,
//! and a later write of the target removes it once it is an hour old. A younger file stays, because
//! the process that writes it may still run, possibly on another machine that uses the same
//! directory.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// The time since the last write from which on a temporary file counts as left over.
const LEFT_OVER_AFTER: Duration = Duration::from_secs(60 * 60);

/// Writes or replaces the file at `path`, with the permissions `mode`.
///
/// After a failure or a crash, the file has either the old contents or the new ones.
///
/// # Errors
/// The error of the operating system. Unless the last sync of the directory failed, the file then
/// has the old contents.
pub fn replace(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    Draft::with_contents(path, contents, mode)?.replace()
}

/// Creates the file at `path`, with the permissions `mode`, unless it exists.
///
/// # Errors
/// The error of the operating system. An existing file is not an error.
pub fn create(path: &Path, contents: &[u8], mode: u32) -> io::Result<Created> {
    Draft::with_contents(path, contents, mode)?.create()
}

/// Renames the file `from`, which another library has written, to `to`, and makes both its contents
/// and its name durable.
///
/// # Errors
/// The error of the operating system.
pub fn publish(from: &Path, to: &Path) -> io::Result<()> {
    sync(from)?;
    fs::rename(from, to)?;
    sync(directory_of(to))
}

/// Makes the contents of a file, or the names in a directory, durable.
///
/// # Errors
/// The error of the operating system.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Returns the directory that contains `path`.
#[must_use]
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The outcome of [`create`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an existing file keeps its contents"]
pub enum Created {
    /// The file was created with the given contents.
    New,
    /// The file exists and was not changed.
    Exists,
}

/// A file that is being written under a temporary name. Dropping a draft removes the file.
#[derive(Debug)]
pub struct Draft {
    file: File,
    path: PathBuf,
    target: PathBuf,
}

impl Draft {
    /// Creates an empty draft of `target`, with the permissions `mode`.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn new(target: &Path, mode: u32) -> io::Result<Self> {
        /// Distinguishes the temporary files of this process.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = target.with_added_extension(format!("{}.{number}.new", process::id()));
        // A killed process with the same id may have left a file with other permissions.
        remove_if_exists(&path)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)?;
        remove_left_over(target, &file);
        Ok(Self { file, path, target: target.to_owned() })
    }

    /// Creates a draft of `target` with these contents and the permissions `mode`, and syncs it.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn with_contents(target: &Path, contents: &[u8], mode: u32) -> io::Result<Self> {
        let mut draft = Self::new(target, mode)?;
        draft.file.write_all(contents)?;
        draft.file.sync_all()?;
        Ok(draft)
    }

    /// Renames the file to its target, and replaces the target if it exists.
    ///
    /// # Errors
    /// The error of the operating system.
    pub fn replace(self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        sync(directory_of(&self.target))
    }

    /// Publishes the file under the name of its target, unless the target exists.
    ///
    /// # Errors
    /// The error of the operating system. An existing target is not an error.
    pub fn create(self) -> io::Result<Created> {
        self.file.sync_all()?;
        // Unlike a rename, a hard link does not replace an existing file, for example one that
        // another process has created meanwhile.
        let created = match fs::hard_link(&self.path, &self.target) {
            Ok(()) => Created::New,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Created::Exists,
            // The file system has no hard links.
            Err(_) if self.target.exists() => Created::Exists,
            Err(_) => {
                fs::rename(&self.path, &self.target)?;
                Created::New
            }
        };
        remove_if_exists(&self.path)?;
        sync(directory_of(&self.target))?;
        Ok(created)
    }
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After a rename, no file has this name. A temporary file that cannot be removed is
        // harmless.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the temporary files of killed processes for `target`. Failures are harmless.
///
/// The new temporary file has the current time of the file system, which all processes that use the
/// directory share.
fn remove_left_over(target: &Path, new: &File) {
    let modified = |file: io::Result<fs::Metadata>| file.and_then(|file| file.modified()).ok();
    let Some(now) = modified(new.metadata()) else { return };
    let Some(name) = target.file_name() else { return };
    let Ok(entries) = fs::read_dir(directory_of(target)) else { return };
    for entry in entries.flatten() {
        let is_left_over = || {
            let age = now.duration_since(modified(entry.metadata())?).ok()?;
            Some(age >= LEFT_OVER_AFTER)
        };
        if is_temporary(&entry.file_name(), name) && is_left_over() == Some(true) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Returns whether `name` is `TARGET.PID.NUMBER.new`.
fn is_temporary(name: &OsStr, target: &OsStr) -> bool {
    let rest = name.as_encoded_bytes().strip_prefix(target.as_encoded_bytes());
    let numbers = rest.and_then(|rest| rest.strip_prefix(b".")?.strip_suffix(b".new"));
    let mut parts = numbers.into_iter().flat_map(|numbers| numbers.split(|byte| *byte == b'.'));
    let mut is_number =
        || parts.next().is_some_and(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit));
    is_number() && is_number() && parts.next().is_none()
}

fn remove_if_exists(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
