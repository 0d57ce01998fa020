//! Restore of a single node.
//!
//! The data directory may be a mount point, so files are restored in place. From the first step to
//! the last the directory contains `restore-unfinished`, and no server starts in a directory with
//! that file:
//!
//! 1. *staging*: the parts are copied to `restoring/`. The database there gets another store id and
//!    loses its one-time KeyPackages and its sessions. The previous contents of the directory are
//!    unchanged.
//! 2. *clearing*: the previous contents are moved to `before-restore-…`.
//! 3. *placing*: the parts are moved from `restoring/` to their final names.
//!
//! `restore-unfinished` contains the step. After a killed run, the next run completes the clearing
//! if it had begun, removes the parts that were placed, and starts with the staging.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use qpq_domain::StoreLimits;
use qpq_durable_file as durable_file;
use qpq_ports::{Clock as _, NewHistory, OldSessions, SystemClock};
use qpq_runtime::data_dir::{DataDir, cluster::AT_REST_KEYS};
use qpq_store_embedded::{
    BLOBS_DIRECTORY, Claim, DATABASE_FILE, EmbeddedStore, LOCK_FILE, RESTORING_FILE,
    TRANSFERRED_FILE,
};

use super::{
    manifest::Manifest,
    node::{CERTIFICATES, SECRETS},
    unfinished::copy_durably,
};

const STAGE: &str = "restoring";

/// The effects of ended sessions on the users of the server, printed after a restore.
pub(super) const SESSIONS_ENDED: &str = "\
All sessions have ended, because some of them may have been revoked after the backup:
  - Every user must log in again (`qpq login`), with the password of the backup. Users who
    registered later must do so again. A password that was changed later is the old one again.
";

/// The effects of kept sessions on the users of the server, printed after a restore.
pub(super) const SESSIONS_KEPT: &str = "\
The sessions of the backup are valid:
  - Sessions that were revoked later, and passwords that were changed later, are valid again. Users
    who registered or logged in later must do so again.
";

/// The other effects of a restore on the users of the server, printed after it.
pub(super) const CONSEQUENCES: &str = "\
For users this means:
  - The server has lost what was sent, registered or changed after the backup. Messages that were
    delivered before the restore are still on the devices.
  - Messages that were queued at the time of the backup are delivered, some of them again. Clients
    recognise repeated messages.
  - Clients notice the new store id, read their inboxes from the start and upload new KeyPackages.
    Until then, a first message to such a user waits, or uses the last-resort package.
Start the server now.
";

/// The result of a restore.
#[derive(Debug)]
pub(super) struct Restored {
    /// The new store id, in hexadecimal digits.
    pub(super) store_id: String,
    pub(super) removed_packages: u64,
    pub(super) ended_sessions: u64,
    /// The directory with the previous data, if there was any.
    pub(super) aside: Option<PathBuf>,
}

impl From<NewHistory> for Restored {
    fn from(history: NewHistory) -> Self {
        Self {
            store_id: history.store_id.to_string(),
            removed_packages: history.removed_packages,
            ended_sessions: history.ended_sessions,
            aside: None,
        }
    }
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  store id      {} (new)", self.store_id)?;
        writeln!(f, "  KeyPackages   {} one-time packages removed", self.removed_packages)?;
        writeln!(f, "  sessions      {} ended", self.ended_sessions)?;
        if let Some(aside) = &self.aside {
            writeln!(f, "  previous data {}", aside.display())?;
        }
        Ok(())
    }
}

/// The step of an unfinished restore, stored in `restore-unfinished`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Staging,
    /// The previous data is moved to this directory.
    Clearing(String),
    /// The previous data, if there was any, is in this directory.
    Placing(Option<String>),
}

impl Step {
    fn text(&self) -> String {
        match self {
            Self::Staging => "staging\n".into(),
            Self::Clearing(aside) => format!("clearing {aside}\n"),
            Self::Placing(None) => "placing\n".into(),
            Self::Placing(Some(aside)) => format!("placing {aside}\n"),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (step, aside) = match text.trim_end().split_once(' ') {
            Some((step, aside)) => (step, Some(aside.to_owned())),
            None => (text.trim_end(), None),
        };
        match (step, aside) {
            ("staging", None) => Some(Self::Staging),
            ("clearing", Some(aside)) => Some(Self::Clearing(aside)),
            ("placing", aside) => Some(Self::Placing(aside)),
            _ => None,
        }
    }
}

/// Restores the verified backup in `from` to `data_dir`.
pub(super) async fn node(
    from: &Path,
    manifest: &Manifest,
    data_dir: &Path,
    replace: bool,
) -> anyhow::Result<Restored> {
    let dir = DataDir::create(data_dir)?;
    let _claim = Claim::take(data_dir)
        .with_context(|| format!("the data directory {}", data_dir.display()))?;
    let before = unfinished(data_dir)?;
    if matches!(before, None | Some(Step::Staging)) && !replace {
        let found = entries(data_dir)?;
        ensure!(
            found.is_empty(),
            "{} is not empty ({}): name another directory, or replace its contents with --replace",
            data_dir.display(),
            found.join(", ")
        );
    }
    let cleared = match before {
        None | Some(Step::Staging) => None,
        Some(Step::Clearing(aside)) => Some(aside),
        Some(Step::Placing(aside)) => {
            remove_placed(data_dir)?;
            aside
        }
    };
    if let Some(aside) = &cleared {
        move_aside(data_dir, aside)?;
    }
    enter(&dir, &Step::Staging)?;
    let history = stage(from, manifest, data_dir).await?;
    let aside = match cleared {
        None if !known(data_dir)?.is_empty() => {
            Some(format!("before-restore-{}", SystemClock.now().0))
        }
        cleared => cleared,
    };
    if let Some(aside) = &aside {
        enter(&dir, &Step::Clearing(aside.clone()))?;
        move_aside(data_dir, aside)?;
    }
    enter(&dir, &Step::Placing(aside.clone()))?;
    place(data_dir)?;
    Ok(Restored { aside: aside.map(|aside| data_dir.join(aside)), ..history.into() })
}

/// Begins another history in a data directory that another program has restored.
pub(super) async fn mark_node(data_dir: &Path, sessions: OldSessions) -> anyhow::Result<Restored> {
    ensure!(
        data_dir.join(DATABASE_FILE).is_file(),
        "{} contains no server data: it has no {DATABASE_FILE}. Name a server's data directory",
        data_dir.display()
    );
    Ok(begin_history(data_dir, sessions).await?.into())
}

async fn begin_history(data_dir: &Path, sessions: OldSessions) -> anyhow::Result<NewHistory> {
    let store = EmbeddedStore::open(data_dir, StoreLimits::default())
        .await
        .with_context(|| format!("the data directory {}", data_dir.display()))?;
    let begun = store.stores().maintenance.begin_history(sessions).await;
    store.close().await;
    Ok(begun?)
}

/// Copies the parts to `restoring/` and begins another history in the database there.
async fn stage(from: &Path, manifest: &Manifest, data_dir: &Path) -> anyhow::Result<NewHistory> {
    let stage = data_dir.join(STAGE);
    match fs::remove_dir_all(&stage) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} cannot be removed", stage.display()));
        }
        _ => {}
    }
    DataDir::create(&stage)?;
    for part in &manifest.parts {
        let to = stage.join(&part.name);
        let directory = durable_file::directory_of(&to);
        DataDir::create(directory)?;
        let (bytes, hash) = copy_durably(&from.join(&part.name), &to)?;
        durable_file::sync(directory)
            .with_context(|| format!("{} cannot be written", directory.display()))?;
        ensure!(
            bytes == part.bytes && hex::encode(hash) == part.sha256,
            "{} changed while it was copied: check the disk, then run this again",
            from.join(&part.name).display()
        );
    }
    let history = begin_history(&stage, OldSessions::End).await?;
    let synced = || -> io::Result<()> {
        // A close without an error leaves no write-ahead log. The lock file is not part of the
        // backup.
        let log = stage.join(format!("{DATABASE_FILE}-wal"));
        if fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
            return Err(io::Error::other(
                "the database's write-ahead log is not empty after the close",
            ));
        }
        fs::remove_file(stage.join(LOCK_FILE))?;
        let blobs = stage.join(BLOBS_DIRECTORY);
        if blobs.exists() {
            durable_file::sync(&blobs)?;
        }
        durable_file::sync(&stage.join(DATABASE_FILE))?;
        durable_file::sync(&stage)?;
        durable_file::sync(data_dir)
    };
    synced().with_context(|| format!("{} cannot be written", stage.display()))?;
    Ok(history)
}

/// Records durably that a step begins.
fn enter(dir: &DataDir, step: &Step) -> anyhow::Result<()> {
    Ok(dir.replace(RESTORING_FILE, step.text().as_bytes())?)
}

/// Returns the step of an earlier run that did not finish.
fn unfinished(data_dir: &Path) -> anyhow::Result<Option<Step>> {
    let path = data_dir.join(RESTORING_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => Step::parse(&text).map(Some).with_context(|| {
            format!("{} is damaged. Name an empty directory with --data-dir", path.display())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// Returns the names in `data_dir`, except those of a restore and of an empty volume.
fn entries(data_dir: &Path) -> anyhow::Result<Vec<String>> {
    let cannot = || format!("{} cannot be read", data_dir.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(data_dir).with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name().to_string_lossy().into_owned();
        let is_expected = [LOCK_FILE, STAGE, RESTORING_FILE, "lost+found"].contains(&name.as_str())
            || name.starts_with(RESTORING_FILE);
        if !is_expected {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Returns the names of a server's files in `data_dir`.
fn known(data_dir: &Path) -> anyhow::Result<Vec<String>> {
    let is_known = |name: &String| {
        name.starts_with(DATABASE_FILE)
            || SECRETS.contains(&name.as_str())
            || CERTIFICATES.contains(&name.as_str())
            || name == AT_REST_KEYS
            || name == TRANSFERRED_FILE
            || name == BLOBS_DIRECTORY
    };
    Ok(entries(data_dir)?.into_iter().filter(is_known).collect())
}

/// Moves the files of a server to the directory `aside`.
fn move_aside(data_dir: &Path, aside: &str) -> anyhow::Result<()> {
    let to = DataDir::create(data_dir.join(aside))?;
    for name in known(data_dir)? {
        fs::rename(data_dir.join(&name), to.path().join(&name))
            .with_context(|| format!("{} cannot be moved", data_dir.join(&name).display()))?;
    }
    let synced = durable_file::sync(to.path()).and_then(|()| durable_file::sync(data_dir));
    synced.with_context(|| format!("{} cannot be written", data_dir.display()))
}

/// Removes the parts that a killed run has placed.
fn remove_placed(data_dir: &Path) -> anyhow::Result<()> {
    for name in known(data_dir)? {
        let path = data_dir.join(&name);
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("{} cannot be removed", path.display()))?;
    }
    Ok(())
}

/// Moves the parts to their final names, then removes `restore-unfinished`.
fn place(data_dir: &Path) -> anyhow::Result<()> {
    let stage = data_dir.join(STAGE);
    let placed = || -> io::Result<()> {
        for entry in fs::read_dir(&stage)? {
            let name = entry?.file_name();
            fs::rename(stage.join(&name), data_dir.join(&name))?;
        }
        fs::remove_dir(&stage)?;
        durable_file::sync(data_dir)?;
        fs::remove_file(data_dir.join(RESTORING_FILE))?;
        // Removes temporary files of killed runs.
        for entry in fs::read_dir(data_dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(RESTORING_FILE) {
                fs::remove_file(entry.path())?;
            }
        }
        durable_file::sync(data_dir)
    };
    match placed() {
        Ok(()) => Ok(()),
        Err(error) => bail!(
            "{} cannot be written: {error}. Check the disk, then run this again",
            data_dir.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_step_is_parsed_to_the_same_step() {
        let aside = || "before-restore-1".to_owned();
        for step in [
            Step::Staging,
            Step::Clearing(aside()),
            Step::Placing(None),
            Step::Placing(Some(aside())),
        ] {
            assert_eq!(Step::parse(&step.text()), Some(step));
        }
        assert_eq!(Step::parse("clearing"), None);
        assert_eq!(Step::parse(""), None);
    }
}
