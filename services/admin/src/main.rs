//! The `qpq-admin` binary: what an operator does to a server or a cluster from outside. One file per
//! command, or per family of commands.
//!
//! Exit codes, as `qpq-server`'s: 0 done, 1 failed, 2 the command line or the configuration is
//! wrong.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "the exception for tests does not reach their helpers")
)]

mod backup;
mod clock;
mod init;
mod jobs;
mod migrate;
mod migrate_to_cluster;
mod rotate;
mod settings;

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use nix::sys::stat::{Mode, umask};
use qpq_runtime::config::ConfigError;

const FAILED: u8 = 1;
const MISUSED: u8 = 2;

/// Administers a qpq server or cluster: backs it up, restores it, sets it up and looks after it.
#[derive(Debug, Parser)]
#[command(name = "qpq-admin", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

/// What to do. To add a command: a line here, a file beside this one, an arm in [`run`].
#[derive(Debug, Subcommand)]
enum Command {
    /// Back up a server, also while it runs, or a cluster.
    Backup(backup::BackupArgs),
    /// Check that a backup is complete and undamaged.
    Verify(backup::VerifyArgs),
    /// Bring a backup back: to a data directory whose server is stopped, or to an empty database of
    /// a cluster whose edges are stopped.
    Restore(backup::RestoreArgs),
    /// Say that a data directory or a cluster's database was restored by other means (a cold copy, a
    /// snapshot, a recovery to a point in time). To be run before the server or the edges start.
    MarkRestored(backup::Which),
    /// Look after the clock of a server without a cluster.
    Clock(clock::Args),
    /// Show the jobs of a server or a cluster, and retry or remove those that failed for good.
    Jobs(jobs::Args),
    /// Make what all edges of a new cluster share: keys and a certificate.
    Init(init::Args),
    /// Bring the schema in the cluster's Postgres up to date. To be run before edges of a new
    /// version start.
    Migrate(migrate::Args),
    /// Move everything that a server without a cluster holds into a cluster: accounts, keys, queued
    /// messages.
    MigrateToCluster(migrate_to_cluster::Args),
    /// Take the next key for TLS session tickets; what the last one made stays good. To be run
    /// every 6 hours.
    RotateTicketKeys(rotate::Args),
    /// Take the next key for the tokens by which clients prove their address.
    RotateTokenKey(rotate::Args),
}

fn main() -> ExitCode {
    // Whatever is made from now on is its owner's alone.
    umask(Mode::from_bits_truncate(0o077));
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(usage) => {
            let _ = usage.print();
            return if usage.use_stderr() { ExitCode::from(MISUSED) } else { ExitCode::SUCCESS };
        }
    };
    match run(&args.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(format_args!("{error:#}"));
            ExitCode::from(if error.is::<ConfigError>() { MISUSED } else { FAILED })
        }
    }
}

fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Backup(args) => backup::backup(args),
        Command::Verify(args) => backup::verify(args),
        Command::Restore(args) => backup::restore(args),
        Command::MarkRestored(args) => backup::mark_restored(args),
        Command::Clock(args) => clock::run(args),
        Command::Jobs(args) => jobs::run(args),
        Command::Init(args) => init::run(args),
        Command::Migrate(args) => migrate::run(args),
        Command::MigrateToCluster(args) => migrate_to_cluster::run(args),
        Command::RotateTicketKeys(args) => rotate::ticket_keys(args),
        Command::RotateTokenKey(args) => rotate::token_key(args),
    }
}

/// For commands that speak with servers.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work)
}

/// On standard error. Nobody may be reading, which is no reason to stop.
fn note(text: impl Display) {
    let _ = writeln!(io::stderr(), "qpq-admin: {text}");
}

/// On standard output. It may be a file on a full disk, and then what was to be kept there is lost.
fn say(text: impl Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|error| {
        anyhow::anyhow!(
            "cannot write to standard output: {error}. Nothing that was to be printed is kept anywhere"
        )
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }
}
