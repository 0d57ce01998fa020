//! Starts `qpq-server` as an operator does, and reads its output.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use bytes::Bytes;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message as _;
use qpq_proto::{Method as _, methods::Health, v1::HealthResponse};
use qpq_transport::{
    Fingerprint,
    client::{Connection, Dialer, Trust},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdout, Command},
    task::JoinHandle,
    time::timeout,
};

/// The time after which a waiting test fails, far above the time that a busy machine needs.
pub(crate) const HANGS: Duration = Duration::from_secs(60);

/// Returns the program without the environment of the test.
pub(crate) fn program(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qpq-server"));
    command.args(arguments).env_clear().envs(variables.iter().copied()).kill_on_drop(true);
    command
}

/// Runs the program to its end.
pub(crate) async fn output(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let output = program(arguments, variables).stdin(Stdio::null()).output();
    timeout(HANGS, output).await.expect("it ends").unwrap()
}

/// Runs the program, which must fail with `code` and print nothing. Returns its standard error.
pub(crate) async fn refusal(code: i32, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let with_backtraces: Vec<_> =
        variables.iter().copied().chain([("RUST_BACKTRACE", "1")]).collect();
    let output = output(arguments, &with_backtraces).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(output.stdout, b"");
    said
}

/// A data directory, removed at the end of the test.
pub(crate) struct Data(tempfile::TempDir);

impl Data {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) async fn start(&self) -> ServerProcess {
        ServerProcess::start(self.path(), &[]).await
    }
}

/// A server process that is ready.
pub(crate) struct ServerProcess {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    stderr: JoinHandle<String>,
    /// The text printed when the server was ready.
    pub(crate) banner: String,
    pub(crate) address: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) fingerprint: Fingerprint,
}

impl ServerProcess {
    /// Starts a server on free ports and waits until it is ready.
    pub(crate) async fn start(data_dir: &str, variables: &[(&str, &str)]) -> Self {
        let variables: Vec<_> =
            [("QPQ_HTTP__LISTEN", "127.0.0.1:0")].iter().chain(variables).copied().collect();
        let mut child = program(&["--listen", "127.0.0.1:0", "--data-dir", data_dir], &variables)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let stderr = tokio::spawn(async move {
            let mut text = String::new();
            stderr.read_to_string(&mut text).await.unwrap();
            text
        });
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut banner = String::new();
        // Without registration, the banner has no commands.
        while ![" dm bob", "registration  closed"].iter().any(|last| banner.contains(last)) {
            match timeout(HANGS, stdout.next_line()).await.expect("it starts").unwrap() {
                Some(line) => banner.extend([line.as_str(), "\n"]),
                None => panic!("it ended before it was ready: {banner}{}", stderr.await.unwrap()),
            }
        }
        let after = |label: &str| {
            let rest =
                banner.split(label).nth(1).unwrap_or_else(|| panic!("no {label} in {banner}"));
            rest.split_whitespace().next().unwrap().to_owned()
        };
        let http = after("health ")
            .strip_prefix("http://")
            .unwrap()
            .strip_suffix("/livez")
            .unwrap()
            .parse();
        let (address, fingerprint) = (after("listening on").parse(), after("fingerprint").parse());
        Self {
            child,
            stdout,
            stderr,
            address: address.unwrap(),
            http: http.unwrap(),
            fingerprint: fingerprint.unwrap(),
            banner,
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = self.child.id().expect("it was not waited for");
        kill(Pid::from_raw(id.try_into().unwrap()), signal).unwrap();
    }

    /// Waits for the end. Returns the exit code (`None` after a signal) and the log.
    pub(crate) async fn ended(mut self) -> (Option<i32>, String) {
        let status = timeout(HANGS, self.child.wait()).await.expect("it ends").unwrap();
        assert_eq!(
            self.stdout.next_line().await.unwrap(),
            None,
            "nothing is printed after the banner"
        );
        (status.code(), self.stderr.await.unwrap())
    }

    /// Kills the server with SIGKILL.
    pub(crate) async fn kill(self) {
        self.signal(Signal::SIGKILL);
        assert_eq!(self.ended().await.0, None);
    }

    pub(crate) async fn connect(&self) -> Connection {
        connect(self.address, self.fingerprint).await
    }

    pub(crate) async fn health(&self) -> HealthResponse {
        health(&self.connect().await).await
    }

    /// Returns status line and body of a page.
    pub(crate) async fn page(&self, path: &str) -> (String, String) {
        page(self.http, path).await
    }
}

pub(crate) async fn connect(address: SocketAddr, fingerprint: Fingerprint) -> Connection {
    let dialer = Dialer::new(Trust::Pin(fingerprint)).unwrap();
    dialer.connect(address, "localhost").await.unwrap()
}

pub(crate) async fn health(connection: &Connection) -> HealthResponse {
    let (status, payload) = connection.call(Health::INFO.id, Bytes::new(), 7, HANGS).await.unwrap();
    assert_eq!(status, 0);
    HealthResponse::decode(payload).unwrap()
}

pub(crate) async fn page(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

/// Returns names and contents of the files in a directory, without the lock and the files of
/// SQLite.
pub(crate) fn secrets_in(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .filter(|(name, _)| !name.starts_with("qpq.db") && name != "lock")
        .collect();
    files.sort();
    files
}
