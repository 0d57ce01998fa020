//! A server as a child process in a directory of its own, both gone when the test ends, however it
//! ends.
//!
//! A test may be killed, so it cannot be trusted to clean up. Each directory has a watchdog: a
//! shell that reads a pipe whose other end only this process holds. When the pipe ends - the
//! [`Service`] was dropped, or this process died - the watchdog stops every process whose working
//! directory is inside and removes the directory. (`PR_SET_PDEATHSIG` would be shorter, but it
//! fires when the *thread* that started the child ends, and runtimes end threads at will.)

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

/// How long a server may take to start or stop before the test fails: far more than a busy machine
/// needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often to look whether it has.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(4);

/// Arguments: the directory, and the signal to try first. `find` shows no link for a zombie, so
/// those do not count.
const WATCHDOG: &str = r#"
trap '' HUP INT TERM
cat >/dev/null
inside() { find /proc/[0-9]*/cwd -maxdepth 0 '(' -lname "$1" -o -lname "$1/*" ')' 2>/dev/null | cut -d/ -f3; }
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
# Postgres, if it was killed, leaves a System V segment: the second number of this line is its id.
segment=$(sed -n 7p "$1/data/postmaster.pid" 2>/dev/null | awk '{ print $2 }')
[ -z "$segment" ] || ipcrm -m "$segment" 2>/dev/null
rm -rf "$1"
"#;

/// A temporary directory that its watchdog removes, after it has stopped what lives there.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    watchdog: Child,
}

impl Home {
    /// `last_signal` is how a server that lives here is stopped for good: the quickest that leaves
    /// nothing behind.
    pub(crate) fn new(name: &str, last_signal: Signal) -> anyhow::Result<Self> {
        let path = tempfile::Builder::new()
            .prefix(&format!("qpq-{name}-"))
            .tempdir()
            .context("no temporary directory can be made")?
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
            // A test runner kills a test's whole process group.
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
    /// Returns once nothing lives there and the directory is gone.
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

/// One server: how it is started, and the process while it runs.
#[derive(Debug)]
pub(crate) struct Service {
    child: Mutex<Option<Child>>,
    command: Mutex<Command>,
    home: Home,
}

impl Service {
    /// `command` is run in `home`, each time anew; what it prints is kept there for the message of
    /// a failure.
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

    /// Starts the server and returns once `ready` says so.
    pub(crate) async fn start<R, F>(&self, ready: R) -> anyhow::Result<()>
    where
        R: Fn() -> F,
        F: Future<Output = bool>,
    {
        {
            let mut child = self.child.lock();
            anyhow::ensure!(
                child.is_none(),
                "{} runs already: stop or kill it first",
                self.program()
            );
            *child = Some(
                self.command
                    .lock()
                    .spawn()
                    .with_context(|| format!("cannot start {}", self.program()))?,
            );
        }
        let deadline = Instant::now() + PATIENCE;
        while !ready().await {
            if let Some(status) = self.exited()? {
                bail!("{} ended at once ({status}); it said:\n{}", self.program(), self.said());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} was not ready after {PATIENCE:?}; it said:\n{}",
                    self.program(),
                    self.said()
                );
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Sends the server `signal` and returns once it and all its children are gone.
    pub(crate) async fn end(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid()?;
        // A stopped process heeds nothing but SIGKILL.
        if signal != Signal::SIGKILL {
            self.signal_all(Signal::SIGCONT);
        }
        kill(pid, signal)?;
        let deadline = Instant::now() + PATIENCE;
        while self.exited()?.is_none() {
            if Instant::now() > deadline {
                bail!("{} ignores {signal}; it said:\n{}", self.program(), self.said());
            }
            sleep(LOOK_EVERY).await;
        }
        while !self.inside().is_empty() {
            if signal == Signal::SIGKILL {
                self.signal_all(Signal::SIGKILL);
            }
            if Instant::now() > deadline {
                bail!("children of {} outlive it", self.program());
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Stops or continues the server and all its children.
    pub(crate) fn signal_all(&self, signal: Signal) {
        for pid in self.inside() {
            // One that has ended meanwhile is no failure.
            let _gone = kill(pid, signal);
        }
    }

    pub(crate) fn pid(&self) -> anyhow::Result<Pid> {
        let child = self.child.lock();
        let child = child.as_ref().with_context(|| format!("{} does not run", self.program()))?;
        Ok(Pid::from_raw(i32::try_from(child.id())?))
    }

    /// Its status, once it has ended; it is then forgotten, so that it can be started again.
    fn exited(&self) -> anyhow::Result<Option<ExitStatus>> {
        let mut child = self.child.lock();
        let status = child.as_mut().context("nothing runs")?.try_wait()?;
        if status.is_some() {
            *child = None;
        }
        Ok(status)
    }

    /// Every process that lives in the home: the server, its children, and children that lost it.
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

    /// The last lines that the server printed.
    fn said(&self) -> String {
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

/// A password that nobody else knows. Everything that a URL has a meaning for is in it, so that
/// whoever takes one from there must read it as it is meant; no configuration file minds.
pub(crate) fn new_password() -> String {
    use rand::{Rng as _, distributions::Alphanumeric, rngs::OsRng};
    "p@:/?#[]%&=+"
        .chars()
        .chain(OsRng.sample_iter(&Alphanumeric).take(32).map(char::from))
        .collect()
}

/// A password as it stands in a URL.
pub(crate) fn in_url(password: &str) -> impl Display {
    percent_encoding::utf8_percent_encode(password, percent_encoding::NON_ALPHANUMERIC)
}

/// A file that only its owner may read, from its first byte on: passwords are in it.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut file =
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
