//! Servers as child processes, with their CPU time in nanoseconds and their resident memory.

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

/// A server for a measurement or a test. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// The lines of the server's output until it was ready.
    pub said: Vec<String>,
}

impl Server {
    /// Starts `command` and waits for a line of its output that `ready` accepts. The caller chooses
    /// where stderr goes.
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
        // Reads the pipe to its end, so that the server never blocks on it. The task ends with the
        // server.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { child, said })
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id().expect("it runs")).expect("a pid")
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?)
    }

    /// Waits until the server has ended and returns its status.
    pub async fn ended(mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait().await?)
    }

    /// Kills the server with SIGKILL.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.child.kill().await?;
        Ok(())
    }
}

/// Returns the CPU time of all threads of a process.
pub fn cpu_time(pid: i32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid)).context("no such process")?;
    Ok(clock.now()?.into())
}

/// Returns the bytes of private resident memory of a process (`RssAnon`).
pub fn resident(pid: i32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib * 1024)
}

/// Returns the path of another binary of this build.
///
/// Binaries are in the folder of the running binary, or above `deps` for a test.
pub fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.ancestors().skip(1).find(|dir| !dir.ends_with("deps")).unwrap_or(Path::new("."));
    let path = dir.join(name);
    anyhow::ensure!(
        path.exists(),
        "{} is missing: build it with `cargo build --workspace --bins`",
        path.display()
    );
    Ok(path)
}
