//! `qpq-admin backup`, `verify`, `restore` and `mark-restored`: copies of what a server or a cluster
//! keeps, and what must happen when a copy takes the place of the original.
//!
//! A backup is a directory:
//!
//! | file | what |
//! |---|---|
//! | `qpq.db` | single node: the database, as of one commit |
//! | `postgres.dump` | cluster: the database, as of one snapshot, in `pg_dump`'s custom format |
//! | `opaque-setup.bin` and others | single node: the secrets, certificate and key of the data directory |
//! | `shared/` | cluster: the directory that all edges share |
//! | `manifest.json` | `manifest::Manifest`: versions, the time, and size and SHA-256 of every part |
//! | `manifest.sha256` | SHA-256 of the manifest, as `sha256sum -c` reads it |
//!
//! It is written as `NAME.unfinished`, made durable, and only then gets its name.

mod cluster;
mod manifest;
mod node;
mod postgres;
mod restore;
mod unfinished;
mod verify;

use std::path::PathBuf;

use qpq_server::Config;

use crate::{
    block_on, say,
    settings::{Given, Location},
};
use manifest::Kind;
use unfinished::Unfinished;

/// The store that a command works on.
#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// The data directory of a single server. Without it the configuration decides: a cluster if it
    /// has `postgres.url`, else the server of its `data_dir`.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    settings: Location,
}

/// The store that is meant.
pub(crate) enum Store {
    Node(PathBuf, Option<Box<Config>>),
    Cluster(Box<Given>),
}

impl Which {
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

/// From where to where.
#[derive(Debug, clap::Args)]
pub(crate) struct BackupArgs {
    /// The directory to create. It must not exist.
    #[arg(value_name = "BACKUP")]
    to: PathBuf,
    #[command(flatten)]
    which: Which,
}

/// Which backup.
#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    /// A directory that `qpq-admin backup` created.
    #[arg(value_name = "BACKUP")]
    from: PathBuf,
}

/// From where to where.
#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// A directory that `qpq-admin backup` created.
    #[arg(value_name = "BACKUP")]
    from: PathBuf,
    /// Replace the data in the directory. What is there is moved into `before-restore-…` beside
    /// it, not deleted. A cluster's database must be empty in any case.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    which: Which,
}

pub(crate) fn backup(args: &BackupArgs) -> anyhow::Result<()> {
    let store = args.which.store()?;
    let target = Unfinished::begin(&args.to)?;
    let (manifest, note) = match &store {
        Store::Node(dir, config) => {
            (block_on(node::back_up(dir, &target))?, config.as_deref().and_then(node::left_out))
        }
        Store::Cluster(given) => (block_on(cluster::back_up(given, &target))?, None),
    };
    target.finish(&manifest)?;
    say(format_args!(
        "backed up {what} to {to}\n{manifest}{note}\
         {to} holds opaque-setup.bin together with the database: who has both can guess at passwords.\n\
         Encrypt it, or keep it where you keep passwords.\n",
        what = manifest.kind,
        to = args.to.display(),
        note = note.unwrap_or_default(),
    ))
}

pub(crate) fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let manifest = block_on(verify::check(&args.from))?;
    say(format_args!("{} is complete and undamaged\n{manifest}", args.from.display()))
}

pub(crate) fn restore(args: &RestoreArgs) -> anyhow::Result<()> {
    let store = args.which.store()?;
    let manifest = block_on(verify::check(&args.from))?;
    let (done, what) = match (&store, manifest.kind) {
        (Store::Node(dir, _), Kind::SingleNode) => (
            block_on(restore::node(&args.from, &manifest, dir, args.replace))?,
            dir.display().to_string(),
        ),
        (Store::Cluster(given), Kind::Cluster) => {
            (block_on(cluster::restore(&args.from, given))?, "the cluster's database".into())
        }
        (_, kind) => anyhow::bail!(
            "{} is a backup of {kind}, and the configuration names another kind of store. Name the right one \
             with --data-dir or --config",
            args.from.display()
        ),
    };
    say(format_args!(
        "restored {from} to {what}, in the state of {at}\n{done}{consequences}",
        from = args.from.display(),
        at = manifest.taken_at,
        consequences = restore::CONSEQUENCES,
    ))
}

pub(crate) fn mark_restored(which: &Which) -> anyhow::Result<()> {
    let done = match which.store()? {
        Store::Node(dir, _) => block_on(restore::mark_node(&dir))?,
        Store::Cluster(given) => block_on(cluster::mark(&given))?,
    };
    say(format_args!("marked as restored\n{done}{}", restore::CONSEQUENCES))
}
