//! The `qpq-server` binary: reads the configuration, starts the server, waits for a reason to stop
//! it.
//!
//! Exit codes: 0 stopped as asked, 1 could not start or failed, 2 the command line or the
//! configuration is wrong.

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::Parser as _;
use nix::sys::stat::{Mode, umask};
use qpq_runtime::{
    lifecycle::{Phase, Shutdown, Tasks},
    log,
    trace::Traces,
};
use qpq_server::{
    Config,
    args::{Args, Command, ConfigCommand},
    banner::Banner,
    compose,
};

const FAILED: u8 = 1;
const MISUSED: u8 = 2;

/// What may still run after the end, at most: a write to a disk that hangs.
const LEFTOVERS: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    // Whatever is made from now on is its owner's alone: the database holds what OPAQUE needs.
    umask(Mode::from_bits_truncate(0o077));
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(usage) => {
            let _ = usage.print();
            return if usage.use_stderr() { ExitCode::from(MISUSED) } else { ExitCode::SUCCESS };
        }
    };
    let loaded = match args.load() {
        Ok(loaded) => loaded,
        Err(error) => return complain(MISUSED, error),
    };
    match args.task() {
        Command::Run => start(&loaded.settings),
        Command::Config(ConfigCommand::Check) => say("the configuration is valid\n"),
        Command::Config(ConfigCommand::Show) => say(loaded.show()),
    }
}

fn start(config: &Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(FAILED, format_args!("cannot start threads: {error}")),
    };
    let inside = runtime.enter();
    let traces = match Traces::start(&config.trace, env!("CARGO_PKG_VERSION")) {
        Ok(traces) => traces,
        Err(error) => return complain(FAILED, error),
    };
    let _log = match log::init(&config.log, &traces) {
        Ok(guard) => guard,
        Err(error) => return complain(FAILED, format_args!("cannot start logging: {error}")),
    };
    let code = runtime.block_on(run(config));
    // The last spans leave over the runtime.
    drop(traces);
    drop(inside);
    runtime.shutdown_timeout(LEFTOVERS);
    code
}

async fn run(config: &Config) -> ExitCode {
    let (shutdown, mut signals) = (Shutdown::default(), Tasks::default());
    if let Err(error) = shutdown.on_signals(&mut signals) {
        return complain(FAILED, format_args!("cannot listen for signals: {error}"));
    }
    let mut running = match compose(config).await {
        Ok(running) => running,
        Err(error) => return complain(FAILED, format_args!("cannot start: {error}")),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listening = ?running.local_addrs(),
        fingerprint = %running.fingerprint(),
        "serving"
    );
    say(Banner::new(&running, config));
    let code = tokio::select! {
        () = shutdown.reached(Phase::Draining) => ExitCode::SUCCESS,
        failure = running.failure() => {
            shutdown.advance(Phase::Stopping);
            complain(FAILED, failure)
        }
    };
    running.shutdown(shutdown.reached(Phase::Stopping)).await;
    code
}

/// On standard output. Nobody may be reading, which is no reason to stop.
fn say(text: impl Display) -> ExitCode {
    let mut out = io::stdout().lock();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
    ExitCode::SUCCESS
}

fn complain(code: u8, error: impl Display) -> ExitCode {
    let _ = writeln!(io::stderr(), "qpq-server: {error}");
    ExitCode::from(code)
}
