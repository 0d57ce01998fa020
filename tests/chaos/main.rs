//! `make chaos`: traffic through a cluster with constant faults, as in the test `acked_never_lost`,
//! with any number of messages.
//!
//! Exit codes: 0 without violations, 1 with violations or if the run failed.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::Parser;
use qpq_tests::{faults::Campaign, traffic::Plan};

/// Sends messages while edges and stores are killed, clocks are wrong, standbys are promoted and
/// backups restored. Checks that every acknowledged message that the store still has is delivered.
#[derive(Debug, Parser)]
#[command(name = "qpq-chaos")]
struct Args {
    /// The number of acknowledged messages.
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// The average number of acknowledged messages between two faults.
    #[arg(long, default_value_t = 2_500)]
    every: u64,
    /// The seed of the faults. Default: a random one.
    #[arg(long)]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let Args { messages, every, seed } = Args::parse();
    let seed = seed.unwrap_or_else(rand::random);
    let mut out = io::stdout();
    writeln!(out, "{messages} messages, seed {seed}")?;
    let traffic = Plan {
        inboxes: 18,
        writers: 48,
        messages,
        payload: 256,
        batches: 5,
        seed,
        ..Plan::default()
    };
    let outcome = Box::pin(Campaign { traffic, every }.run()).await?;
    writeln!(out, "{outcome}")?;
    Ok(if outcome.summary.report.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
