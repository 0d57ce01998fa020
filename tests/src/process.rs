//! Servers as child processes, and what they use: CPU time to the nanosecond, and resident memory.

use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, kill},
    time::clock_getcpuclockid,
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

/// A server that was started for a measurement or a test. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Lines it printed until it was ready.
    pub said: Vec<String>,
}

impl Server {
    /// Starts `command` (whose stderr is the caller's choice) and waits for a line of its output
    /// that `ready` accepts.
    pub async fn start(mut command: Command, ready: impl Fn(&str) -> bool) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut said = Vec::new();
        loop {
            let line = lines.next_line().await?.context("the server ended before it was ready")?;
            let is_ready = ready(&line);
            said.push(line);
            if is_ready {
                break;
            }
        }
        // The pipe stays open and is read on, so that the server never blocks on it.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { child, said })
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id().expect("it runs")).expect("a pid")
    }

    /// Asks it to end, as an operator does.
    pub fn terminate(&self) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?)
    }

    /// Returns when it has ended by itself; how.
    pub async fn ended(mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait().await?)
    }

    /// `kill -9`.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.child.kill().await?;
        Ok(())
    }
}

/// CPU time that the process has used, in all its threads.
pub fn cpu_time(pid: i32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid)).context("no such process")?;
    Ok(clock.now()?.into())
}

/// Bytes of memory that the process has resident and shares with nobody (`RssAnon`).
pub fn resident(pid: i32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib * 1024)
}

/// A binary of this build, beside the one that runs (test binaries lie in a folder of their own,
/// `deps`).
pub fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.ancestors().skip(1).find(|dir| !dir.ends_with("deps")).unwrap_or(Path::new("."));
    let path = dir.join(name);
    anyhow::ensure!(
        path.exists(),
        "{} is missing: `cargo build --workspace --bins` makes it",
        path.display()
    );
    Ok(path)
}
