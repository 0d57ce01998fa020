//! The `qpq-admin` binary: commands for operators of a single node or a cluster. One file for each
//! command or group of commands.
//!
//! The exit codes are those of `qpq-server`: 0 done, 1 failed, 2 the command line or the
//! configuration is wrong.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "the exception for tests does not cover their helpers")
)]

mod backup;
mod clock;
mod init;
mod invite;
mod jobs;
mod migrate;
mod migrate_to_cluster;
mod rotate;
mod settings;

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};
use nix::sys::stat::{Mode, umask};
use qpq_runtime::config::ConfigError;

const FAILED: u8 = 1;
const MISUSED: u8 = 2;

/// Administers a qpq server or cluster: sets up, backs up, restores, maintains.
#[derive(Debug, Parser)]
#[command(name = "qpq-admin", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

/// The command. A new command is a variant here, a file next to this one, and an arm in [`run`].
#[derive(Debug, Subcommand)]
enum Command {
    /// Back up a single node or a cluster, also while it runs.
    Backup(backup::BackupArgs),
    /// Check that a backup is complete and undamaged.
    Verify(backup::VerifyArgs),
    /// Restore a backup into the data directory of a stopped server, or into an empty database of a
    /// cluster whose edges are stopped.
    Restore(backup::RestoreArgs),
    /// Mark a data directory or a cluster's database as restored, after a cold copy, a snapshot or
    /// a point-in-time recovery. Run this before the server or the edges start.
    MarkRestored(backup::MarkRestoredArgs),
    /// Accept the clock of a single node.
    Clock(clock::Args),
    /// Show the jobs of a single node or a cluster, and retry or remove those that failed.
    Jobs(jobs::Args),
    /// Create, list and revoke invites, with which people register.
    Invite(invite::Args),
    /// Create the files that all edges of a new cluster share: keys and a certificate.
    Init(init::Args),
    /// Bring the schema in the cluster's Postgres up to date. Run this before edges of a new
    /// release start.
    Migrate(migrate::Args),
    /// Transfer the data of a single node into a cluster: accounts, keys, queued messages.
    MigrateToCluster(migrate_to_cluster::Args),
    /// Replace the key of TLS session tickets. Tickets of the previous key stay valid. Run this
    /// every 6 hours.
    RotateTicketKeys(rotate::Args),
    /// Replace the key of the tokens that validate the addresses of clients.
    RotateTokenKey(rotate::Args),
    /// Add a key to those that seal stored data of accounts, as recovery bundles. Old keys stay, so
    /// that older data can be read.
    RotateAtRestKeys(rotate::AtRestArgs),
    /// Create the keys that seal stored data of accounts, in the shared directory of a cluster that
    /// was created before they existed.
    AddAtRestKeys(rotate::Args),
}

fn main() -> ExitCode {
    // Files created from now on are readable by their owner only.
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
            print_note(format_args!("{error:#}"));
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
        Command::Invite(args) => invite::run(args),
        Command::Init(args) => init::run(args),
        Command::Migrate(args) => migrate::run(args),
        Command::MigrateToCluster(args) => migrate_to_cluster::run(args),
        Command::RotateTicketKeys(args) => rotate::ticket_keys(args),
        Command::RotateTokenKey(args) => rotate::token_key(args),
        Command::RotateAtRestKeys(args) => rotate::at_rest_keys(args),
        Command::AddAtRestKeys(args) => rotate::add_at_rest_keys(args),
    }
}

/// Runs the work of a command on an async runtime.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work)
}

/// Writes a line to standard error. Ignores errors, so that a closed standard error does not end a
/// command.
fn print_note(text: impl Display) {
    let _ = writeln!(io::stderr(), "qpq-admin: {text}");
}

/// Writes to standard output.
///
/// Fails if the text cannot be written, for example to a file on a full disk, because the text may
/// be the only copy of a secret.
fn print(text: impl Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|error| {
        anyhow::anyhow!(
            "cannot write to standard output: {error}. The output is lost. Free space or redirect \
             it elsewhere, then run this again"
        )
    })
}

/// Formats a duration in the largest unit of which it has at least two, rounded down.
fn roughly(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn clap_accepts_the_definition_of_the_command_line() {
        Args::command().debug_assert();
    }
}
