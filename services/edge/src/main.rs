//! The `qpq-server` binary: reads the configuration, starts the server, and waits for a reason to
//! stop.
//!
//! Exit codes: 0 stopped by a signal, 1 could not start or failed, 2 the command line or the
//! configuration is wrong.

use std::{
    env,
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::Parser as _;
use nix::sys::stat::{Mode, umask};
use qpq_runtime::{
    config::Loaded,
    lifecycle::{Shutdown, Tasks},
    log::{self, LogGuard},
    service_manager::{ServiceManager, State, watchdog_interval},
    trace::Traces,
};
use qpq_server::{
    Config, Running,
    args::{Args, Command, ConfigCommand},
    banner::Banner,
    check, compose_with,
};
use qpq_transport::Reload;
use tokio::signal::unix::{SignalKind, signal};

const FAILED: u8 = 1;
const MISUSED: u8 = 2;

/// Maximum time for blocking work after the end, such as a write to a disk that hangs.
const BLOCKING_WORK_TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    // New files are readable for their owner alone. The database contains the OPAQUE records.
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
        Err(error) => return fail(MISUSED, error),
    };
    match args.task() {
        Command::Run => start(&args, &loaded),
        Command::Config(ConfigCommand::Check) => {
            let report = check(&loaded.settings);
            match report.problems() {
                [] => print(report),
                problems => fail(MISUSED, problems.join("\nqpq-server: ")),
            }
        }
        Command::Config(ConfigCommand::Show) => print(loaded.show()),
    }
}

fn start(args: &Args, loaded: &Loaded<Config>) -> ExitCode {
    let config = &loaded.settings;
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, format_args!("cannot start threads: {error}")),
    };
    let inside = runtime.enter();
    let traces = match Traces::start(&config.trace, env!("CARGO_PKG_VERSION")) {
        Ok(traces) => traces,
        Err(error) => return fail(FAILED, error),
    };
    let log = match log::init(&config.log, &traces) {
        Ok(guard) => guard,
        Err(error) => return fail(FAILED, format_args!("cannot start logging: {error}")),
    };
    let code = runtime.block_on(run(args, loaded, &log));
    // Sends the last spans, which needs the runtime.
    drop(traces);
    drop(inside);
    runtime.shutdown_timeout(BLOCKING_WORK_TIMEOUT);
    code
}

async fn run(args: &Args, loaded: &Loaded<Config>, log: &LogGuard) -> ExitCode {
    let config = &loaded.settings;
    let (shutdown, mut signals) = (Shutdown::default(), Tasks::default());
    let listening = shutdown.on_signals(&mut signals).and_then(|()| signal(SignalKind::hangup()));
    let mut hangups = match listening {
        Ok(hangups) => hangups,
        Err(error) => {
            return fail(FAILED, format_args!("cannot listen for signals: {error}"));
        }
    };
    let manager = match ServiceManager::at(env::var_os("NOTIFY_SOCKET").as_deref()) {
        Ok(manager) => manager,
        Err(error) => {
            return fail(FAILED, format_args!("cannot use the address in NOTIFY_SOCKET: {error}"));
        }
    };
    let mut running = match compose_with(config, shutdown.draining().clone()).await {
        Ok(running) => running,
        Err(error) => return fail(FAILED, format_args!("cannot start: {error}")),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listening = ?running.local_addrs(),
        fingerprint = %running.fingerprint(),
        "serving"
    );
    print(Banner::new(&running, config));
    manager.notify(State::Ready);
    let [micros, process] = ["WATCHDOG_USEC", "WATCHDOG_PID"].map(env::var_os);
    if let Some(every) = watchdog_interval(micros.as_deref(), process.as_deref()) {
        running.keep_alive(manager.clone(), every);
    }
    let code = loop {
        tokio::select! {
            () = shutdown.draining().cancelled() => break ExitCode::SUCCESS,
            failure = running.failure() => {
                shutdown.stopping().cancel();
                break fail(FAILED, failure);
            }
            Some(()) = hangups.recv() => {
                manager.notify(State::Reloading);
                reload(args, loaded, log, &running);
                manager.notify(State::Ready);
            }
        }
    };
    manager.notify(State::Stopping);
    running.shutdown(shutdown.stopping().cancelled()).await;
    code
}

/// Reloads the log filter, the certificate and its key, which can change while the server runs.
/// Logs the names of other settings that have changed.
fn reload(args: &Args, started: &Loaded<Config>, log: &LogGuard, running: &Running) {
    match args.load() {
        Ok(now) => {
            match log.set_filter(&now.settings.log) {
                Ok(()) => {}
                Err(error) => tracing::warn!(%error, "log filter not changed"),
            }
            let changed = started.changes(&now);
            let (reloaded, waiting): (Vec<_>, Vec<_>) =
                changed.into_iter().partition(|path| RELOADED.contains(&path.as_str()));
            tracing::info!(
                changed = %list(&reloaded),
                "configuration reloaded on SIGHUP"
            );
            if !waiting.is_empty() {
                tracing::warn!(
                    settings = %list(&waiting),
                    "changed settings need a restart, the old ones stay in effect"
                );
            }
        }
        Err(error) => tracing::error!(
            %error,
            "configuration not reloaded, the old one stays in effect"
        ),
    }
    match running.reload_certificate() {
        Ok(Reload::Unchanged) => tracing::info!("certificate is unchanged"),
        Ok(Reload::Changed(fingerprint)) => {
            tracing::info!(%fingerprint, "certificate changed");
        }
        Err(error) => {
            tracing::warn!(%error, "certificate not reloaded, the old one stays in effect");
        }
    }
}

/// Settings that a running server reloads.
const RELOADED: [&str; 1] = ["log.filter"];

fn list(settings: &[String]) -> String {
    if settings.is_empty() { "nothing".to_owned() } else { settings.join(", ") }
}

/// Prints to standard output. Ignores errors, so that a closed output does not stop the server.
fn print(text: impl Display) -> ExitCode {
    let mut out = io::stdout().lock();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
    ExitCode::SUCCESS
}

/// Prints to standard error and returns `code`.
fn fail(code: u8, error: impl Display) -> ExitCode {
    let _ = writeln!(io::stderr(), "qpq-server: {error}");
    ExitCode::from(code)
}
