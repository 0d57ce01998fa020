//! `qpq-load`: what a server costs and how long it takes, measured beside the floor it stands on.
//!
//! `run` offers a load to a server that is there; `bench` starts everything itself (a server, a
//! bare quinn echo that answers the same frames, the cryptography and SQLite alone), runs each pair
//! in turn, several times, and prints ratios. Arrivals are *open-loop*: they come at a fixed rate
//! whether or not earlier calls are answered, and latency counts from the moment a call was due, so
//! waiting is counted (Schroeder et al., "Open versus closed", NSDI 2006).
//!
//! The client here is its own small implementation of the wire on bare quinn: the same code drives
//! the server and the echo, and it shares nothing with the SDK.

#![allow(clippy::print_stdout, reason = "a command whose output is its result")]

mod bench;
mod cluster;
mod echo;
mod flat;
mod floor;
mod modes;
mod open_loop;
mod report;

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};

use qpq_tests::client::Pin;

use crate::{modes::Mode, report::Report};

#[derive(Parser)]
#[command(name = "qpq-load", version, about = "Open-loop load for a qpq server, beside its floors")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Offer one kind of load to a running server (its rate limits should be off).
    Run(RunArgs),
    /// Start servers on loopback and measure each beside its floor.
    Bench(bench::BenchArgs),
    /// Start a cluster on loopback and measure it beside its floors.
    BenchCluster(cluster::ClusterArgs),
    /// The yardstick: a bare quinn server that answers every frame.
    #[command(hide = true)]
    Echo(echo::EchoArgs),
}

#[derive(clap::Args)]
struct RunArgs {
    /// What to do.
    mode: Mode,
    /// The server, on this machine.
    #[arg(long, default_value = "127.0.0.1:5001")]
    server: SocketAddr,
    /// SHA-256 of the server's certificate, in hexadecimal.
    #[arg(long)]
    pin: Pin,
    /// Arrivals a second.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// For how long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Connections that share the arrivals (for `idle`: that wait).
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Accounts that are made for it.
    #[arg(long, default_value_t = 16)]
    accounts: usize,
    /// Bytes of a message.
    #[arg(long, default_value_t = 1024)]
    payload: usize,
    /// The server's process, to tell its CPU time and memory.
    #[arg(long)]
    pid: Option<i32>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Run(args) => run(args).await,
        Command::Bench(args) => bench::bench(args).await,
        Command::BenchCluster(args) => Box::pin(cluster::bench(args)).await,
        Command::Echo(args) => echo::serve(args).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("qpq-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.server.ip().is_loopback(),
        "load goes to this machine alone: {} is not on loopback",
        args.server
    );
    let plan = modes::Plan {
        mode: args.mode,
        rate: args.rate,
        duration: Duration::from_secs(args.seconds),
        connections: args.connections,
        accounts: args.accounts,
        payload: args.payload,
    };
    let report: Report = modes::run(&plan, args.server, args.pin, args.pid).await?;
    println!("{report}");
    Ok(())
}
