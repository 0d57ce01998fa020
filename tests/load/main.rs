//! `qpq-load`: measures throughput, latency and cost of a server, and compares them with floors.
//!
//! `run` sends a load to a running server. `bench` starts everything itself (a server, a bare quinn
//! echo that answers the same frames, the cryptography alone, SQLite alone), measures each pair
//! several times, and prints ratios. Arrivals are *open-loop*: they have a fixed rate, independent
//! of earlier answers, and latency counts from the time at which a call was due, so it includes
//! waiting (Schroeder et al., "Open versus closed", NSDI 2006).
//!
//! The client is a small implementation of the protocol on bare quinn, which shares nothing with
//! the SDK. The same code drives the server and the echo.

#![allow(clippy::print_stdout, reason = "a command whose output is its result")]

mod bench;
mod cluster;
mod echo;
mod fan_out;
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
#[command(
    name = "qpq-load",
    version,
    about = "Open-loop load for a qpq server, compared with its floors"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send one kind of load to a running server, whose rate limits should be off.
    Run(RunArgs),
    /// Start servers on loopback and compare each with its floor.
    Bench(bench::BenchArgs),
    /// Start a cluster on loopback and compare it with its floors.
    BenchCluster(cluster::ClusterArgs),
    /// The floor of QUIC: a bare quinn server that answers every frame.
    #[command(hide = true)]
    Echo(echo::EchoArgs),
}

#[derive(clap::Args)]
struct RunArgs {
    /// The kind of load.
    mode: Mode,
    /// The address of the server, on this machine.
    #[arg(long, default_value = "127.0.0.1:5001")]
    server: SocketAddr,
    /// SHA-256 of the server's public key, in hexadecimal.
    #[arg(long)]
    pin: Pin,
    /// Arrivals per second.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Duration in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Connections that share the arrivals, or wait (`idle`).
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Accounts to create.
    #[arg(long, default_value_t = 16)]
    accounts: usize,
    /// Size of a message in bytes.
    #[arg(long, default_value_t = 1024)]
    payload: usize,
    /// The server's process id, for its CPU time and memory.
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
        "load may only go to this machine: {} is not on loopback",
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
