//! `qpq-admin clock accept`: tells a server on a single node that the clock of this machine is
//! right after all. A server whose clock jumped ahead by more than 25 hours removes nothing that has
//! expired until then. Works whether the server runs or not; one that runs follows within a minute.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Subcommand;
use qpq_ports::{Clock as _, SystemClock};
use qpq_store_embedded::{Accepted, accept_clock};

use crate::{block_on, say};

/// What to do with the clock.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Accept the present time as right, however far it is from what the server has seen.
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
    say(format_args!("{}\n", sentence(accepted)))
}

fn sentence(Accepted { before, now }: Accepted) -> String {
    let Some(before) = before else {
        return "Accepted the clock. The server has stored nothing yet.".into();
    };
    let (ahead, back) = (now.since(before), before.since(now));
    let step = if ahead >= back {
        format!("{} ahead of", roughly(ahead))
    } else {
        format!("{} behind", roughly(back))
    };
    format!("Accepted the clock, which is {step} the time that the server believed.")
}

fn roughly(duration: Duration) -> String {
    let hours = duration.as_secs() / 3_600;
    match hours {
        0 => format!("{} s", duration.as_secs()),
        1..48 => format!("{hours} h"),
        _ => format!("{} days", hours / 24),
    }
}
