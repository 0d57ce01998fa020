//! A server as a child process in its own directory. Both are removed when the test ends, also if
//! the test is killed.
//!
//! A killed test cannot clean up. So each directory has a watchdog: a shell that reads a pipe of
//! which this process has the other end. When the pipe ends, because the [`Service`] was dropped or
//! this process died, the watchdog ends every process whose working directory is inside and removes
//! the directory. (`PR_SET_PDEATHSIG` is not an alternative: it fires when the *thread* that
//! started the child ends, and runtimes end threads at any time.)

use std::{
    fmt::Display,
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

/// The time limit for a start or stop, far above what a busy machine needs.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);
/// The interval between two checks of a condition.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(4);

/// The script of a watchdog. Its arguments are the directory and the first signal to send. `find`
/// ignores zombies, whose link it cannot read.
const WATCHDOG: &str = r#"
trap '' HUP INT TERM
cat >/dev/null
inside() {
    find /proc/[0-9]*/cwd -maxdepth 0 '(' -lname "$1" -o -lname "$1/*" ')' 2>/dev/null |
        cut -d/ -f3
}
signal=$2
tries=0
while pids=$(inside "$1") && [ -n "$pids" ]; do
    if [ $((tries % 100)) = 0 ]; then
        kill -"$signal" $pids
        kill -CONT $pids
        signal=KILL
    fi
    tries=$((tries + 1))
    [ $tries -lt 1000 ] || break
    sleep 0.02
done 2>/dev/null
# A killed Postgres leaves a System V segment: the second number of this line is its id.
segment=$(sed -n 7p "$1/data/postmaster.pid" 2>/dev/null | awk '{ print $2 }')
[ -z "$segment" ] || ipcrm -m "$segment" 2>/dev/null
rm -rf "$1"
"#;

/// A temporary directory. Its watchdog ends the processes in it and removes it.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    watchdog: Child,
}

impl Home {
    /// Creates a directory. Its watchdog ends the server with `last_signal`: the fastest signal
    /// after which the server leaves no resources.
    pub(crate) fn new(name: &str, last_signal: Signal) -> anyhow::Result<Self> {
        let path = tempfile::Builder::new()
            .prefix(&format!("qpq-{name}-"))
            .tempdir()
            .context("cannot create a temporary directory")?
            .keep()
            .canonicalize()?;
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(&path)
            .arg(last_signal.as_str().trim_start_matches("SIG"))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A test runner kills the process group of a test. The watchdog must survive it.
            .process_group(0)
            .spawn()
            .context("cannot start sh")?;
        Ok(Self { path, watchdog })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Home {
    /// Waits until all processes in the directory have ended and it is removed.
    fn clear(&mut self) {
        drop(self.watchdog.stdin.take());
        let _done = self.watchdog.wait();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A server: its command, and its process while it runs.
#[derive(Debug)]
pub(crate) struct Service {
    child: Mutex<Option<Child>>,
    command: Mutex<Command>,
    home: Home,
}

impl Service {
    /// Creates a server. Each start runs `command` in `home`. The output is written to a file
    /// there, for error messages.
    pub(crate) fn new(home: Home, mut command: Command) -> anyhow::Result<Self> {
        let log = OpenOptions::new().create(true).append(true).open(home.path().join("log"))?;
        command
            .current_dir(home.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        Ok(Self { child: Mutex::new(None), command: Mutex::new(command), home })
    }

    pub(crate) fn path(&self) -> &Path {
        self.home.path()
    }

    /// Starts the server and waits until `ready` returns true.
    pub(crate) async fn start<R, F>(&self, ready: R) -> anyhow::Result<()>
    where
        R: Fn() -> F,
        F: Future<Output = bool>,
    {
        {
            let mut child = self.child.lock();
            anyhow::ensure!(
                child.is_none(),
                "{} is running: stop or kill it first",
                self.program()
            );
            *child = Some(
                self.command
                    .lock()
                    .spawn()
                    .with_context(|| format!("cannot start {}", self.program()))?,
            );
        }
        let deadline = Instant::now() + TIMEOUT;
        while !ready().await {
            if let Some(status) = self.exited()? {
                bail!("{} ended ({status}) with output:\n{}", self.program(), self.last_output());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} was not ready after {TIMEOUT:?}, output:\n{}",
                    self.program(),
                    self.last_output()
                );
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Sends `signal` to the server and waits until it and all its children have ended.
    pub(crate) async fn end(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid()?;
        // A stopped process reacts only to SIGKILL.
        if signal != Signal::SIGKILL {
            self.signal_all(Signal::SIGCONT);
        }
        kill(pid, signal)?;
        let deadline = Instant::now() + TIMEOUT;
        while self.exited()?.is_none() {
            if Instant::now() > deadline {
                bail!("{} ignores {signal}, output:\n{}", self.program(), self.last_output());
            }
            sleep(POLL_INTERVAL).await;
        }
        while !self.inside().is_empty() {
            if signal == Signal::SIGKILL {
                self.signal_all(Signal::SIGKILL);
            }
            if Instant::now() > deadline {
                bail!("children of {} have not ended", self.program());
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Sends a signal to the server and all its children.
    pub(crate) fn signal_all(&self, signal: Signal) {
        for pid in self.inside() {
            // A process that has ended is not a failure.
            let _gone = kill(pid, signal);
        }
    }

    pub(crate) fn pid(&self) -> anyhow::Result<Pid> {
        let child = self.child.lock();
        let child = child.as_ref().with_context(|| format!("{} is not running", self.program()))?;
        Ok(Pid::from_raw(i32::try_from(child.id())?))
    }

    /// Returns the exit status if the server has ended. Then it can be started again.
    fn exited(&self) -> anyhow::Result<Option<ExitStatus>> {
        let mut child = self.child.lock();
        let status = child.as_mut().context("the server is not running")?.try_wait()?;
        if status.is_some() {
            *child = None;
        }
        Ok(status)
    }

    /// Returns every process in the directory: the server, its children, and orphaned children.
    fn inside(&self) -> Vec<Pid> {
        fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
                cwd.starts_with(self.path()).then(|| Pid::from_raw(pid))
            })
            .collect()
    }

    fn program(&self) -> String {
        self.command.lock().get_program().to_string_lossy().into_owned()
    }

    /// Returns the last lines of the server's output.
    fn last_output(&self) -> String {
        let log = fs::read(self.path().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.home.clear();
        if let Some(mut child) = self.child.lock().take() {
            let _reaped = child.wait();
        }
    }
}

/// Generates a password with all characters that have a meaning in URLs.
///
/// Code that does not decode these characters fails. No configuration file treats the characters
/// specially.
pub(crate) fn new_password() -> String {
    use rand::{Rng as _, distributions::Alphanumeric, rngs::OsRng};
    "p@:/?#[]%&=+"
        .chars()
        .chain(OsRng.sample_iter(&Alphanumeric).take(32).map(char::from))
        .collect()
}

/// Encodes a password for a URL.
pub(crate) fn in_url(password: &str) -> impl Display {
    percent_encoding::utf8_percent_encode(password, percent_encoding::NON_ALPHANUMERIC)
}

/// Writes a file for passwords, with mode 0600 from its creation.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut file =
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
