//! A real server in this process, and people who use the real `qpq` on it.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use qpq_runtime::{config::ListenOn, http::Http};
use qpq_server::{Config, Running, compose};
use serde_json::Value;
use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

pub(crate) const PASSWORD: &str = "correct horse battery staple";
/// The time after which a test counts as stuck.
const STUCK: Duration = Duration::from_secs(60);

/// A server with the homes of its users.
pub(crate) struct World {
    config: Config,
    running: Option<Running>,
    pub(crate) address: String,
    pub(crate) fingerprint: String,
    dir: TempDir,
    /// The directory for `$XDG_RUNTIME_DIR` of each person, which is therefore in memory.
    memory: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// Starts a server with a configuration of its own.
    pub(crate) async fn with(configure: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            data_dir: dir.path().join("data"),
            http: Http { listen: ListenOn::Off },
            ..Config::default()
        };
        config.limits.enabled = false;
        configure(&mut config);
        let running = Box::pin(compose(&config)).await.unwrap();
        config.listen = running.local_addr().into();
        Self {
            address: running.local_addr().to_string(),
            fingerprint: running.fingerprint().to_string(),
            running: Some(running),
            config,
            dir,
            memory: tempfile::tempdir_in("/dev/shm").unwrap(),
        }
    }

    pub(crate) async fn stop(&mut self) {
        self.running.take().expect("it runs").shutdown(std::future::ready(())).await;
    }

    /// Copies the data directory while the server is stopped. Returns the path of the copy.
    pub(crate) async fn copy_data(&mut self) -> PathBuf {
        self.stop().await;
        let night = self.dir.path().join("night");
        copy(&self.config.data_dir, &night);
        self.start_again().await;
        night
    }

    /// Replaces the data directory by an older copy.
    pub(crate) async fn restore_data(&mut self, night: &Path) {
        self.stop().await;
        std::fs::remove_dir_all(&self.config.data_dir).unwrap();
        copy(night, &self.config.data_dir);
        self.start_again().await;
    }

    /// Changes the database of a server that is stopped, as a dishonest server would.
    pub(crate) async fn sql(&self, statement: &'static str) {
        let path = self.config.data_dir.join("qpq.db");
        let mut connection = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
        sqlx::query(statement).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    /// Creates an invite with this number of uses, for one username or for any. Returns its code.
    pub(crate) async fn invite(&self, uses: u32, username: Option<&str>) -> &'static str {
        let path = self.config.data_dir.join("qpq.db");
        let mut connection = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
        // The SHA-256 of the code.
        let statement = "INSERT INTO invite VALUES
            (x'd77bd86a0e004d9c21a03cdbfeac637b484d184bdda05d72ad726e029c9003a1',
             ?1, ?1, ?2, '', 0, 9000000000000)";
        sqlx::query(statement).bind(uses).bind(username).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        "0000-0000-0000-0000-0000-0000-0000"
    }

    /// Starts the server again on the same port.
    pub(crate) async fn start_again(&mut self) {
        self.port_is_free().await;
        self.running = Some(Box::pin(compose(&self.config)).await.unwrap());
    }

    /// Starts the server again on the same port, with the same accounts and a new certificate.
    pub(crate) async fn start_with_another_certificate(&mut self) {
        for name in ["server-cert.der", "server-key.der"] {
            std::fs::remove_file(self.config.data_dir.join(name)).unwrap();
        }
        self.port_is_free().await;
        let running = Box::pin(compose(&self.config)).await.unwrap();
        self.fingerprint = running.fingerprint().to_string();
        self.running = Some(running);
    }

    /// Waits until the port of a server that was stopped is free.
    async fn port_is_free(&self) {
        // The tasks of the connections that were closed release the port soon after.
        let address = self.address.clone();
        soon(async move {
            while std::net::UdpSocket::bind(&address).is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Returns a person without an account.
    pub(crate) fn person(&self, name: &str) -> Person {
        Person {
            name: name.to_owned(),
            home: self.dir.path().join(name),
            runtime: self.memory.path().join(name),
            server: self.address.clone(),
        }
    }

    /// Returns a person with an account, logged in.
    pub(crate) async fn user(&self, name: &str) -> Person {
        let person = self.person(name);
        person.ok(&["register", name, "--pin", &self.fingerprint]).await;
        person
    }

    /// Registers an account whose username the configuration lists as that of an administrator.
    pub(crate) async fn admin(&self, name: &str) -> Person {
        let code = self.invite(1, Some(name)).await;
        let person = self.person(name);
        person.ok(&["register", name, "--invite", code, "--pin", &self.fingerprint]).await;
        person
    }
}

/// One person at a machine of their own.
pub(crate) struct Person {
    pub(crate) name: String,
    pub(crate) home: PathBuf,
    pub(crate) runtime: PathBuf,
    pub(crate) server: String,
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// Returns the error that `--json` wrote.
    #[track_caller]
    pub(crate) fn error(&self) -> Value {
        let lines: Vec<_> = self.err.lines().collect();
        let [line] = lines[..] else { panic!("one line of JSON is expected: {self:?}") };
        serde_json::from_str::<Value>(line).unwrap()["error"].take()
    }

    /// Checks exit code and error code of a `--json` command that must fail.
    #[track_caller]
    pub(crate) fn fails(&self, exit: i32, code: &str) {
        assert_eq!(
            (self.code, self.error()["code"].as_str()),
            (Some(exit), Some(code)),
            "{self:?}"
        );
        assert!(self.out.is_empty(), "{self:?}");
    }

    /// Returns each line of standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<Value> {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Person {
    /// Returns the command, in an environment with only the variables set here.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qpq"));
        command
            .args(args)
            .env_clear()
            .envs(self.environment())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if matches!(args.first(), Some(&("register" | "login"))) {
            command.env("QPQ_PASSWORD", PASSWORD);
        }
        command
    }

    /// Returns the environment of every command.
    pub(crate) fn environment(&self) -> [(&'static str, OsString); 3] {
        std::fs::create_dir_all(&self.runtime).unwrap();
        [
            ("QPQ_HOME", self.home.clone().into()),
            ("QPQ_SERVER", self.server.clone().into()),
            ("XDG_RUNTIME_DIR", self.runtime.clone().into()),
        ]
    }

    /// Runs a command to its end.
    pub(crate) async fn run(&self, args: &[&str]) -> Ran {
        self.run_with(args, "").await
    }

    /// Runs a command with `input` on standard input.
    pub(crate) async fn run_with(&self, args: &[&str], input: &str) -> Ran {
        let child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        finish(child, input).await
    }

    /// Runs a command that must succeed and write nothing to standard error. Returns its standard
    /// output.
    pub(crate) async fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args).await;
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{} {args:?}: {ran:?}", self.name);
        ran.out
    }

    /// Runs a command with `--json` that must succeed.
    pub(crate) async fn json(&self, args: &[&str]) -> Vec<Value> {
        self.run(&[args, &["--json"]].concat()).await.json()
    }

    /// Runs a command with `--json` that must fail.
    pub(crate) async fn fails(&self, args: &[&str], exit: i32, code: &str) -> Value {
        let ran = self.run(&[args, &["--json"]].concat()).await;
        ran.fails(exit, code);
        ran.error()
    }

    /// Starts a command that runs until its input ends or it is interrupted.
    pub(crate) fn start(&self, args: &[&str]) -> Process {
        let mut child =
            self.command(args).stdin(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Process { child, stdin, lines }
    }

    /// Returns the paths of the kept keys.
    pub(crate) fn kept_keys(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.runtime.join("qpq")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Copies the profile, which no command uses. Returns the path of the copy.
    pub(crate) fn copy_profile(&self) -> PathBuf {
        let night = self.home.join("night");
        copy(&self.home.join("profiles/default"), &night);
        night
    }

    /// Replaces the profile by an older copy.
    pub(crate) fn restore_profile(&self, night: &Path) {
        let profile = self.home.join("profiles/default");
        std::fs::remove_dir_all(&profile).unwrap();
        copy(night, &profile);
    }

    /// Returns the same person at another machine, to which all files were copied.
    pub(crate) fn stolen_copy(&self) -> Person {
        let of = |path: &Path| path.with_extension("stolen");
        copy(&self.home, &of(&self.home));
        copy(&self.runtime, &of(&self.runtime));
        let stolen = Person {
            name: self.name.clone(),
            home: of(&self.home),
            runtime: of(&self.runtime),
            server: self.server.clone(),
        };
        // The file of the key is named after the path of the profile.
        let profile = stolen.home.join("profiles/default");
        let name =
            hex::encode(&<sha2::Sha256 as sha2::Digest>::digest(profile.to_str().unwrap())[..16]);
        let kept = stolen.kept_keys().pop().unwrap();
        std::fs::rename(&kept, kept.with_file_name(format!("{name}.key"))).unwrap();
        stolen
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

/// A running command, used line by line.
pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) async fn write_line(&mut self, line: &str) {
        self.stdin.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    pub(crate) async fn read_line(&mut self) -> String {
        soon(self.lines.next_line()).await.unwrap().expect("it ended instead of saying something")
    }

    pub(crate) fn end_input(&mut self) {
        self.stdin = None;
    }

    /// Ends the input of the command and waits for its end.
    pub(crate) async fn end(mut self) -> ExitStatus {
        self.end_input();
        soon(self.child.wait()).await.unwrap()
    }

    /// Interrupts the command as Ctrl-C does.
    pub(crate) async fn interrupt(mut self) -> ExitStatus {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGINT)
            .unwrap();
        soon(self.child.wait()).await.unwrap()
    }
}

/// Writes the input of a command and waits for its end.
pub(crate) async fn finish(mut child: Child, input: &str) -> Ran {
    let mut stdin = child.stdin.take().unwrap();
    // A command that does not read its input may end before it is written.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let (mut out, mut err) = (String::new(), String::new());
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (read_out, read_err, status) = soon(async {
        tokio::join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err), child.wait())
    })
    .await;
    read_out.and(read_err).unwrap();
    Ran { code: status.unwrap().code(), out, err }
}

/// Fails a test that would otherwise hang.
pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    timeout(STUCK, future).await.expect("it takes much too long")
}
