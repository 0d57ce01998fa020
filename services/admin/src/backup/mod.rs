//! `qpq-admin backup`, `verify`, `restore` and `mark-restored`: copies of the data of a single node
//! or a cluster, and the steps when a copy replaces the original.
//!
//! A backup is a directory:
//!
//! | file | content |
//! |---|---|
//! | `qpq.db` | single node: the database after some commit |
//! | `blobs/` | single node: the files of the blobs in the database |
//! | `postgres.dump` | cluster: a snapshot of the database, in the custom format of `pg_dump` |
//! | `opaque-setup.bin` and others | single node: the secrets, certificate and key of the data directory |
//! | `shared/` | cluster: the directory that all edges share |
//! | `manifest.json` | `manifest::Manifest`: versions, the time, and size and SHA-256 of every part |
//! | `manifest.sha256` | SHA-256 of the manifest, for `sha256sum -c` |
//!
//! The directory is written as `NAME.unfinished`, made durable, and then renamed.

mod cluster;
mod manifest;
mod node;
mod postgres;
mod restore;
mod unfinished;
mod verify;

use std::path::PathBuf;

use qpq_ports::OldSessions;
use qpq_server::Config;

use crate::{
    block_on, print,
    settings::{ClusterSettings, Location},
};
use manifest::StoreKind;
use unfinished::UnfinishedBackup;

/// The arguments that select the store of a command.
#[derive(Debug, clap::Args)]
pub(crate) struct StoreArgs {
    /// The data directory of a single node. Without it the configuration decides: a cluster if it
    /// has `postgres.url`, else the single node of its `data_dir`.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    settings: Location,
}

/// The store of a command.
pub(crate) enum Store {
    /// The data directory of a single node, and the configuration if it names the directory.
    Node(PathBuf, Option<Box<Config>>),
    Cluster(Box<ClusterSettings>),
}

impl StoreArgs {
    pub(crate) fn store(&self) -> anyhow::Result<Store> {
        if let Some(dir) = &self.data_dir {
            return Ok(Store::Node(dir.clone(), None));
        }
        let config = self.settings.load_any()?;
        if config.postgres.url.is_some() {
            return Ok(Store::Cluster(Box::new(self.settings.load()?)));
        }
        Ok(Store::Node(config.data_dir.clone(), Some(Box::new(config))))
    }
}

/// The arguments of `backup`.
#[derive(Debug, clap::Args)]
pub(crate) struct BackupArgs {
    /// The directory to create. It must not exist.
    #[arg(value_name = "BACKUP")]
    to: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
}

/// The arguments of `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    /// A directory that `qpq-admin backup` created.
    #[arg(value_name = "BACKUP")]
    from: PathBuf,
}

/// The arguments of `mark-restored`.
#[derive(Debug, clap::Args)]
pub(crate) struct MarkRestoredArgs {
    /// Keep the sessions of the restored data. Otherwise all sessions end and users log in again,
    /// because sessions that were revoked after the copy was made would be valid again. Choose this
    /// only if no more than the last seconds were lost, as after a failover.
    #[arg(long)]
    keep_sessions: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// The arguments of `restore`.
#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// A directory that `qpq-admin backup` created.
    #[arg(value_name = "BACKUP")]
    from: PathBuf,
    /// Replace the data in the directory. The previous data is moved to `before-restore-…` in it,
    /// not deleted. A cluster's database must be empty in any case.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(crate) fn backup(args: &BackupArgs) -> anyhow::Result<()> {
    let store = args.store.store()?;
    let target = UnfinishedBackup::create(&args.to)?;
    let (manifest, note) = match &store {
        Store::Node(dir, config) => (
            block_on(node::back_up(dir, &target))?,
            config.as_deref().and_then(node::omitted_files),
        ),
        Store::Cluster(settings) => (block_on(cluster::back_up(settings, &target))?, None),
    };
    target.finish(&manifest)?;
    print(format_args!(
        "backed up {what} to {to}\n{manifest}{note}\
         {to} contains opaque-setup.bin together with the database. With both, passwords can be \
         guessed offline.\n\
         Encrypt the backup, or store it like passwords.\n",
        what = manifest.kind,
        to = args.to.display(),
        note = note.unwrap_or_default(),
    ))
}

pub(crate) fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let manifest = block_on(verify::check(&args.from))?;
    print(format_args!("{} is complete and undamaged\n{manifest}", args.from.display()))
}

pub(crate) fn restore(args: &RestoreArgs) -> anyhow::Result<()> {
    let store = args.store.store()?;
    let manifest = block_on(verify::check(&args.from))?;
    let (restored, target) = match (&store, manifest.kind) {
        (Store::Node(dir, _), StoreKind::SingleNode) => (
            block_on(restore::node(&args.from, &manifest, dir, args.replace))?,
            dir.display().to_string(),
        ),
        (Store::Cluster(settings), StoreKind::Cluster) => {
            (block_on(cluster::restore(&args.from, settings))?, "the cluster's database".into())
        }
        (_, kind) => anyhow::bail!(
            "{} is a backup of {kind}, and the configuration names another kind of store. Name the \
             right one with --data-dir or --config",
            args.from.display()
        ),
    };
    print(format_args!(
        "restored {from} to {target}, in the state of {at}\n{restored}{sessions}{consequences}",
        from = args.from.display(),
        at = manifest.taken_at,
        sessions = restore::SESSIONS_ENDED,
        consequences = restore::CONSEQUENCES,
    ))
}

pub(crate) fn mark_restored(args: &MarkRestoredArgs) -> anyhow::Result<()> {
    let (sessions, effect) = if args.keep_sessions {
        (OldSessions::Keep, restore::SESSIONS_KEPT)
    } else {
        (OldSessions::End, restore::SESSIONS_ENDED)
    };
    let restored = match args.store.store()? {
        Store::Node(dir, _) => block_on(restore::mark_node(&dir, sessions))?,
        Store::Cluster(settings) => block_on(cluster::mark(&settings, sessions))?,
    };
    print(format_args!("marked as restored\n{restored}{effect}{}", restore::CONSEQUENCES))
}
