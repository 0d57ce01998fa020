//! `qpq-admin rotate-ticket-keys` and `rotate-token-key`: the next key becomes the current one, the
//! current one the previous one, and the previous one is forgotten.
//!
//! The edges see it by themselves, each at its own time, and meanwhile take what the others make.
//! So two rotations must be further apart than the slowest edge needs to see one:
//! `tls.reload_interval`, 30 s if not set, and with Kubernetes the minute or two until a changed
//! Secret is in the pods.

use std::path::PathBuf;

use qpq_runtime::data_dir::{
    SecretFile,
    cluster::{TICKET_KEYS, TOKEN_KEY},
};

use crate::say;

/// Whose keys.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory that `qpq-admin init` made.
    #[arg(long, value_name = "DIR", env = "QPQ_CLUSTER__SECRETS_DIR")]
    dir: PathBuf,
}

pub(crate) fn ticket_keys(args: &Args) -> anyhow::Result<()> {
    rotate(
        args,
        TICKET_KEYS,
        "Rotate again in 6 hours: clients are told that a ticket is good for 12.",
    )
}

pub(crate) fn token_key(args: &Args) -> anyhow::Result<()> {
    rotate(
        args,
        TOKEN_KEY,
        "Tokens live for 15 s; rotate again when you like, but not within 5 minutes.",
    )
}

fn rotate(args: &Args, file: SecretFile, next: &str) -> anyhow::Result<()> {
    let path = qpq_server::rotate(&args.dir, file)?;
    say(format_args!(
        "rotated {path}: edges that read this directory take it by themselves\n{next}\n\
         If the edges have copies, or a Kubernetes Secret, bring them this file now.\n",
        path = path.display()
    ))
}
