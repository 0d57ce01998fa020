//! `qpq-admin rotate-ticket-keys`, `rotate-token-key`, `rotate-at-rest-keys` and
//! `add-at-rest-keys`.
//!
//! Of ticket keys and token keys, the next key becomes the current one, the
//! current one the previous one, and the previous one is removed.
//! Keys at rest are never removed: the next key becomes the current one, and a new next key is
//! added.
//!
//! Each edge reloads the file at its own time, and accepts tickets and tokens of all three keys.
//! Therefore two rotations must be further apart than the slowest edge needs for a reload:
//! `tls.reload_interval`, 30 s by default, and with Kubernetes the one or two minutes until a
//! changed Secret is in the pods.

use std::path::PathBuf;

use qpq_runtime::data_dir::{
    SecretFile,
    cluster::{TICKET_KEYS, TOKEN_KEY},
};

use qpq_server::AtRestKeysAdded;

use crate::print;

/// The arguments of the commands for shared directories.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory that `qpq-admin init` created.
    #[arg(long, value_name = "DIR", env = "QPQ_CLUSTER__SECRETS_DIR")]
    dir: PathBuf,
}

pub(crate) fn ticket_keys(args: &Args) -> anyhow::Result<()> {
    rotate(args, TICKET_KEYS, "Rotate again in 6 hours: tickets are valid for 12.")
}

pub(crate) fn token_key(args: &Args) -> anyhow::Result<()> {
    rotate(args, TOKEN_KEY, "Tokens expire after 15 s. Do not rotate again within 5 minutes.")
}

/// The arguments of `rotate-at-rest-keys`.
#[derive(Debug, clap::Args)]
pub(crate) struct AtRestArgs {
    /// The directory that `qpq-admin init` created, or the data directory of a single node.
    #[arg(long, value_name = "DIR", env = "QPQ_CLUSTER__SECRETS_DIR")]
    dir: PathBuf,
}

pub(crate) fn at_rest_keys(args: &AtRestArgs) -> anyhow::Result<()> {
    let path = qpq_server::rotate_at_rest_keys(&args.dir)?;
    print(format_args!(
        "rotated {path}: old keys stay in the file\n\
         Copy the file to every edge, or update the Kubernetes Secret with it, then restart the \
         edges one after the other. Back it up.\n\
         Do not rotate again before every edge was restarted. If the old file was stolen, rotate \
         a second time afterwards: the thief has the next key of that file, too.\n",
        path = path.display()
    ))
}

pub(crate) fn add_at_rest_keys(args: &Args) -> anyhow::Result<()> {
    match qpq_server::add_at_rest_keys(&args.dir)? {
        AtRestKeysAdded::Created(path) => print(format_args!(
            "created {path}, which all edges of the cluster share\n\
             Copy the file to every edge, or add it to the Kubernetes Secret, before edges of this \
             release start. Back it up.\n",
            path = path.display()
        )),
        AtRestKeysAdded::Exists(path) => print(format_args!("{} already exists\n", path.display())),
    }
}

fn rotate(args: &Args, file: SecretFile, next: &str) -> anyhow::Result<()> {
    let path = qpq_server::rotate(&args.dir, file)?;
    print(format_args!(
        "rotated {path}: edges that use this directory reload the file by themselves\n{next}\n\
         If the edges use copies, or a Kubernetes Secret, update those with this file now.\n",
        path = path.display()
    ))
}
