//! `qpq-admin rotate-ticket-keys` and `rotate-token-key`: the next key becomes the current one, the
//! current one the previous one, and the previous one is removed.
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

use crate::print;

/// The arguments of both commands.
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

fn rotate(args: &Args, file: SecretFile, next: &str) -> anyhow::Result<()> {
    let path = qpq_server::rotate(&args.dir, file)?;
    print(format_args!(
        "rotated {path}: edges that use this directory reload the file by themselves\n{next}\n\
         If the edges use copies, or a Kubernetes Secret, update those with this file now.\n",
        path = path.display()
    ))
}
