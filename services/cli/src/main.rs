//! `qpq`, the messenger for the terminal: parses the command line, runs one command, and reports
//! the result by text and exit code. `args` defines the command line, `commands` has the commands,
//! and `compose` builds the context of every command.

mod args;
mod chat;
mod commands;
mod compose;
mod entry;
mod error;
mod output;
mod password;
mod progress;
mod text;
mod unlock;

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser as _, error::ErrorKind};
use tracing_subscriber::{
    Layer as _,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::{
    args::Cli,
    compose::{Context, Environment},
    error::{CliError, Exit},
    output::{Format, Output},
};

/// The maximum time to wait, at the end, for a thread that reads a person's input.
const GOODBYE: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misuse(&error),
    };
    let profile = cli.global.profile.clone();
    let format = if cli.global.json { Format::Json } else { Format::Human };
    log(cli.global.verbose);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let exit = error.exit;
            Output::new(format, true).error(&error.in_profile(&profile));
            exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| CliError::io("cannot start", &error))?;
    let done = runtime.block_on(async {
        let context = Context::new(cli.global, Environment::read()?)?;
        tokio::select! {
            done = Box::pin(commands::run(cli.command, &context)) => done,
            _ = tokio::signal::ctrl_c() => Err(CliError::interrupted()),
        }
    });
    runtime.shutdown_timeout(GOODBYE);
    done
}

/// Reports a command line that is invalid, or shows the help that it asks for.
fn misuse(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args_os().any(|arg| arg == "--json");
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that closed standard output does not need the help.
            error.print().ok();
            ExitCode::SUCCESS
        }
        _ if wants_json => {
            let text = error.render().to_string();
            let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            let usage = CliError::usage(message).hint("see `qpq help`");
            Output { format: Format::Json, style: output::Style::Plain }.error(&usage);
            Exit::Usage.into()
        }
        _ => {
            error.print().ok();
            Exit::Usage.into()
        }
    }
}

/// Logs the events of this project only: those of libraries are not checked for secrets.
fn log(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::ERROR,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .with_filter(Targets::new().with_target("qpq", level));
    tracing_subscriber::registry().with(lines).init();
}
