//! Bringing back a single server.
//!
//! The data directory may be a mount point, so it is filled where it is. From the first step to the
//! last it holds `restore-unfinished`, beside which no server starts:
//!
//! 1. *staging*: the parts are copied to `restoring/`, the database gets another store id there and
//!    loses its one-time KeyPackages. What was in the directory is untouched.
//! 2. *clearing*: what was in the directory is moved into `before-restore-…`.
//! 3. *placing*: the parts are moved from `restoring/` to their places.
//!
//! The file says which step it is. A run after one that was killed finishes the clearing if that had
//! begun, removes the parts that were placed, and begins anew.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use qpq_durable_file as durable_file;
use qpq_ports::{Clock as _, NewHistory, SystemClock};
use qpq_runtime::data_dir::DataDir;
use qpq_store_embedded::{Claim, DATABASE_FILE, EmbeddedStore, Limits, MOVED_FILE, RESTORING_FILE};

use super::{
    manifest::Manifest,
    node::{CERTIFICATES, SECRETS},
    unfinished::copy_durably,
};

const STAGE: &str = "restoring";
const LOCK_FILE: &str = "lock";

/// What a restore means for those who use the server.
pub(super) const CONSEQUENCES: &str = "\
For users this means:
  - What was sent, registered or changed after the backup was taken is gone from the server. Messages
    that were delivered in time are still on their devices.
  - Messages that were queued when the backup was taken are delivered, some of them perhaps a second
    time; clients recognise those.
  - Sessions and passwords are those of the backup. Who registered or logged in later does so again.
  - Clients notice the new store id, read their inboxes from the start and upload new KeyPackages.
    Until a client has done so, a first message to its user waits for it or uses the last-resort
    package.
Start the server now.
";

/// What was done to the store.
#[derive(Debug)]
pub(super) struct Done {
    /// In hexadecimal digits.
    pub(super) store_id: String,
    pub(super) removed_packages: u64,
    /// Where the data is that was there before.
    pub(super) aside: Option<PathBuf>,
}

impl From<NewHistory> for Done {
    fn from(history: NewHistory) -> Self {
        Self {
            store_id: history.store_id.to_string(),
            removed_packages: history.removed_packages,
            aside: None,
        }
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  store id      {} (new)", self.store_id)?;
        writeln!(f, "  KeyPackages   {} one-time ones removed", self.removed_packages)?;
        if let Some(aside) = &self.aside {
            writeln!(f, "  data before   {}", aside.display())?;
        }
        Ok(())
    }
}

/// How far a restore got; the text of `restore-unfinished`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Staging,
    /// Into this directory.
    Clearing(String),
    /// What was cleared is in this directory.
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

/// Restores the checked backup in `from` to `data_dir`.
pub(super) async fn node(
    from: &Path,
    manifest: &Manifest,
    data_dir: &Path,
    replace: bool,
) -> anyhow::Result<Done> {
    let dir = DataDir::create(data_dir)?;
    let _claim = Claim::take(data_dir)
        .with_context(|| format!("the data directory {}", data_dir.display()))?;
    let before = unfinished(data_dir)?;
    if matches!(before, None | Some(Step::Staging)) && !replace {
        let there = entries(data_dir)?;
        ensure!(
            there.is_empty(),
            "{} is not empty ({}): name another directory, or replace what is there with --replace",
            data_dir.display(),
            there.join(", ")
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
    Ok(Done { aside: aside.map(|aside| data_dir.join(aside)), ..history.into() })
}

/// Begins another history in a data directory that was restored by other means.
pub(super) async fn mark_node(data_dir: &Path) -> anyhow::Result<Done> {
    ensure!(
        data_dir.join(DATABASE_FILE).is_file(),
        "{} holds no server's data: there is no {DATABASE_FILE} in it",
        data_dir.display()
    );
    Ok(begin_history(data_dir).await?.into())
}

async fn begin_history(data_dir: &Path) -> anyhow::Result<NewHistory> {
    let store = EmbeddedStore::open(data_dir, Limits::default())
        .await
        .with_context(|| format!("the data directory {}", data_dir.display()))?;
    let begun = store.stores().maintenance.begin_history().await;
    store.close().await;
    Ok(begun?)
}

/// Copies the parts beside what is there, and makes them another history.
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
        let (bytes, hash) = copy_durably(&from.join(&part.name), &stage.join(&part.name))?;
        ensure!(
            bytes == part.bytes && hex::encode(hash) == part.sha256,
            "{} changed while it was copied: check the disk, then run this again",
            from.join(&part.name).display()
        );
    }
    let history = begin_history(&stage).await?;
    let synced = || -> io::Result<()> {
        // A store that was closed well has no log, and the lock is the stage's own.
        let log = stage.join(format!("{DATABASE_FILE}-wal"));
        if fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
            return Err(io::Error::other("the database's log could not be written back"));
        }
        fs::remove_file(stage.join(LOCK_FILE))?;
        durable_file::sync(&stage.join(DATABASE_FILE))?;
        durable_file::sync(&stage)?;
        durable_file::sync(data_dir)
    };
    synced().with_context(|| format!("{} cannot be written", stage.display()))?;
    Ok(history)
}

/// Writes down, durably, that a step begins.
fn enter(dir: &DataDir, step: &Step) -> anyhow::Result<()> {
    Ok(dir.replace(RESTORING_FILE, step.text().as_bytes())?)
}

/// How far an earlier run got, if it did not end.
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

/// The names of all that is there, but for what a restore itself or an empty volume has.
fn entries(data_dir: &Path) -> anyhow::Result<Vec<String>> {
    let cannot = || format!("{} cannot be read", data_dir.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(data_dir).with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name().to_string_lossy().into_owned();
        let is_ours = [LOCK_FILE, STAGE, RESTORING_FILE, "lost+found"].contains(&name.as_str())
            || name.starts_with(RESTORING_FILE);
        if !is_ours {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The names of what a server keeps that are there.
fn known(data_dir: &Path) -> anyhow::Result<Vec<String>> {
    let is_known = |name: &String| {
        name.starts_with(DATABASE_FILE)
            || SECRETS.contains(&name.as_str())
            || CERTIFICATES.contains(&name.as_str())
            || name == MOVED_FILE
    };
    Ok(entries(data_dir)?.into_iter().filter(is_known).collect())
}

fn move_aside(data_dir: &Path, aside: &str) -> anyhow::Result<()> {
    let to = DataDir::create(data_dir.join(aside))?;
    for name in known(data_dir)? {
        fs::rename(data_dir.join(&name), to.path().join(&name))
            .with_context(|| format!("{} cannot be moved", data_dir.join(&name).display()))?;
    }
    let synced = durable_file::sync(to.path()).and_then(|()| durable_file::sync(data_dir));
    synced.with_context(|| format!("{} cannot be written", data_dir.display()))
}

/// Removes what a run that was killed while it placed the parts has placed.
fn remove_placed(data_dir: &Path) -> anyhow::Result<()> {
    for name in known(data_dir)? {
        fs::remove_file(data_dir.join(&name))
            .with_context(|| format!("{} cannot be removed", data_dir.join(&name).display()))?;
    }
    Ok(())
}

/// Moves the parts to their places, and lets servers start.
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
        // What runs that were killed have left of the file.
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
            "{} cannot be filled: {error}. See to the disk, then run this again",
            data_dir.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_read_as_it_was_written() {
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
