//! A NATS server for one test: core NATS, no JetStream, one user with a generated password.

use std::{fmt::Write as _, net::SocketAddr, process::Command};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::{
    authority::Authority,
    port::Port,
    process::{Home, Service, in_url, new_password, write_private},
    program::Program,
};

const USER: &str = "qpq";

/// A running NATS server. Dropping it ends it.
#[derive(Debug)]
pub struct Nats {
    service: Service,
    port: Port,
    /// `None` if the password is a token.
    user: Option<&'static str>,
    password: String,
    scheme: &'static str,
}

impl Nats {
    pub async fn start() -> anyhow::Result<Self> {
        Self::launch(Some(USER), None).await
    }

    /// Starts a server without users, which accepts a token.
    pub async fn start_with_token() -> anyhow::Result<Self> {
        Self::launch(None, None).await
    }

    /// Starts a server that accepts only TLS.
    pub async fn start_encrypted(authority: &Authority) -> anyhow::Result<Self> {
        Self::launch(Some(USER), Some(authority)).await
    }

    async fn launch(
        user: Option<&'static str>,
        authority: Option<&Authority>,
    ) -> anyhow::Result<Self> {
        let program = Program::Nats.find()?;
        let port = Port::reserve()?;
        let password = new_password();
        let home = Home::new("nats", Signal::SIGKILL)?;
        let file = home.path().join("nats.conf");
        // Quoted, because NATS parses an unquoted password that begins like a number as a number. A
        // long timeout, because the default of two seconds for the login is too short on a busy
        // machine.
        let login = match user {
            Some(user) => format!("user: \"{user}\", password: \"{password}\""),
            None => format!("token: \"{password}\""),
        };
        let mut configuration = format!(
            "host: \"127.0.0.1\"\nport: {}\nauthorization {{ {login}, timeout: 60 }}\n",
            port.number()
        );
        if let Some(authority) = authority {
            let issued = authority.issue(home.path())?;
            let (certificate, key) = (issued.certificate.display(), issued.key.display());
            writeln!(configuration, "tls {{ cert_file: \"{certificate}\", key_file: \"{key}\" }}")?;
        }
        write_private(&file, &configuration)?;

        let mut command = Command::new(program);
        command.arg("-c").arg(file);
        let scheme = if authority.is_some() { "tls" } else { "nats" };
        let nats = Self { service: Service::new(home, command)?, port, user, password, scheme };
        nats.start_again().await?;
        Ok(nats)
    }

    /// Returns the URL for clients.
    pub fn url(&self) -> String {
        self.url_via(self.addr())
    }

    /// Returns the URL with another address, such as a proxy's.
    pub fn url_via(&self, addr: SocketAddr) -> String {
        let user = self.user.map(|user| format!("{user}:")).unwrap_or_default();
        format!("{}://{user}{}@{addr}", self.scheme, in_url(&self.password))
    }

    pub const fn port(&self) -> u16 {
        self.port.number()
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn password(&self) -> &str {
        &self.password
    }

    /// Checks that the server accepts the password and answers; with TLS, that it requires TLS.
    pub async fn ping(&self) -> anyhow::Result<()> {
        let mut stream = BufReader::new(TcpStream::connect(self.addr()).await?);
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        ensure!(line.starts_with("INFO "), "not a greeting of NATS: {line}");
        if self.scheme == "tls" {
            ensure!(line.contains("\"tls_required\":true"), "NATS does not require TLS: {line}");
            return Ok(());
        }
        let password = &self.password;
        let login = match self.user {
            Some(user) => format!("\"user\":\"{user}\",\"pass\":\"{password}\""),
            None => format!("\"auth_token\":\"{password}\""),
        };
        let hello = format!("CONNECT {{\"verbose\":false,{login}}}\r\nPING\r\n");
        stream.write_all(hello.as_bytes()).await?;
        line.clear();
        stream.read_line(&mut line).await.context("NATS closed the connection")?;
        ensure!(line == "PONG\r\n", "NATS refused: {line}");
        Ok(())
    }

    /// Stops the server as an operator does.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGTERM).await
    }

    pub async fn kill9(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGKILL).await
    }

    /// Starts the server after `stop` or `kill9`, on the same port with the same user.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        self.service.start(|| async { self.ping().await.is_ok() }).await
    }

    pub async fn restart(&self) -> anyhow::Result<()> {
        self.stop().await?;
        self.start_again().await
    }

    /// Suspends the server: connections stay open without an answer.
    pub fn freeze(&self) {
        self.service.signal_all(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.service.signal_all(Signal::SIGCONT);
    }
}
