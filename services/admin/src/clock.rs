//! `qpq-admin clock accept`: confirms that the clock of a single node is right.
//!
//! A single node whose clock jumped by more than 25 hours removes no expired data until then. The
//! server may be running or stopped. A running server removes expired data again within a minute.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;
use qpq_ports::{Clock as _, SystemClock};
use qpq_store_embedded::{Accepted, accept_clock};

use crate::{block_on, print, roughly};

/// The arguments of `clock`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Accept the current time as right, at any distance from the last time that the server has
    /// seen.
    Accept(Accept),
}

#[derive(Debug, clap::Args)]
struct Accept {
    /// The server's data directory.
    #[arg(long, value_name = "DIR", env = "QPQ_DATA_DIR")]
    data_dir: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Command::Accept(Accept { data_dir }) = &args.command;
    let accepted = block_on(async { Ok(accept_clock(data_dir, SystemClock.now()).await?) })
        .context("the clock was not accepted")?;
    print(format_args!("{}\n", sentence(accepted)))
}

fn sentence(Accepted { before, now }: Accepted) -> String {
    let Some(before) = before else {
        return "Accepted the clock. The server has stored no data yet.".into();
    };
    let (ahead, back) = (now.since(before), before.since(now));
    let step = if ahead >= back {
        format!("{} ahead of", roughly(ahead))
    } else {
        format!("{} behind", roughly(back))
    };
    format!("Accepted the clock, which is {step} the last time that the server trusted.")
}
