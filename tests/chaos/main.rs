//! `make chaos`: traffic through a cluster that has no rest, as the test *acked, never lost* has
//! it, for as many messages as are asked for.
//!
//! Exit codes: 0 nothing was lost, 1 something was or the run did not come to its end.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::Parser;
use qpq_tests::{havoc::Campaign, traffic::Plan};

/// Sends messages while edges and stores are killed, and judges what came of it.
#[derive(Debug, Parser)]
#[command(name = "qpq-chaos")]
struct Args {
    /// How many messages are to be acknowledged.
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// How many of them between two strikes, on average.
    #[arg(long, default_value_t = 2_500)]
    every: u64,
    /// What decides the strikes; another each time, if none is named.
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
    let outcome = Campaign { traffic, every }.run().await?;
    writeln!(out, "{outcome}")?;
    Ok(if outcome.summary.report.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
