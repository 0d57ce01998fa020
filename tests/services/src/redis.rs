//! A Redis server for one test. By default it keeps nothing on disk and is empty after a restart.

use std::{
    fmt::{self, Write as _},
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
};

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::{
    authority::Authority,
    port::Port,
    process::{Home, Service, in_url, new_password, write_private},
    program::Program,
    resp::{Connection, Reply},
};

/// The argument that starts a Sentinel.
pub(crate) const SENTINEL: &str = "--sentinel";

/// A running Redis. Dropping it ends it and removes its data.
#[derive(Debug)]
pub struct Redis {
    service: Service,
    port: Port,
    /// The port with TLS.
    encrypted: Option<Port>,
    password: String,
}

/// The contents of a Redis at some time.
#[derive(Clone)]
pub struct Snapshot(Vec<u8>);

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot({} bytes)", self.0.len())
    }
}

impl Redis {
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts a server with `settings` as in redis.conf, such as `("appendonly", "yes")`.
    pub async fn start_with(settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        Self::launch(&new_password(), settings, &[], None).await
    }

    /// Starts a server with a second port for TLS, which [`url`](Self::url) returns. The test
    /// itself uses the first port.
    pub async fn start_encrypted(authority: &Authority) -> anyhow::Result<Self> {
        Self::launch(&new_password(), &[], &[], Some(authority)).await
    }

    /// Starts a server, or a Sentinel if `arguments` contain [`SENTINEL`]. Several servers may
    /// share a password and use TLS between them.
    pub(crate) async fn launch(
        password: &str,
        settings: &[(&str, &str)],
        arguments: &[&str],
        authority: Option<&Authority>,
    ) -> anyhow::Result<Self> {
        let program = Program::Redis.find()?;
        let port = Port::reserve()?;
        let home = Home::new("redis", Signal::SIGKILL)?;
        let mut configuration = format!(
            "port {}\nbind 127.0.0.1\nrequirepass {password}\ndir \"{}\"\n",
            port.number(),
            home.path().display()
        );
        if !arguments.contains(&SENTINEL) {
            writeln!(configuration, "save \"\"\nmasterauth {password}")?;
        }
        let encrypted = authority
            .map(|authority| encrypt(&mut configuration, home.path(), authority))
            .transpose()?;
        for (name, value) in settings {
            writeln!(configuration, "{name} {value}")?;
        }
        let file = home.path().join("redis.conf");
        write_private(&file, &configuration)?;

        let mut command = Command::new(program);
        command.arg(file).args(arguments);
        let service = Service::new(home, command)?;
        let redis = Self { service, port, encrypted, password: password.to_owned() };
        redis.start_again().await?;
        Ok(redis)
    }

    /// Returns the URL for clients.
    pub fn url(&self) -> String {
        self.url_via(self.served_at())
    }

    /// Returns the URL with another address, such as a proxy's.
    pub fn url_via(&self, addr: SocketAddr) -> String {
        format!("{}://:{}@{addr}/", self.scheme(), in_url(&self.password))
    }

    pub const fn port(&self) -> u16 {
        self.port.number()
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// Returns the address for clients: the port with TLS, if there is one.
    pub(crate) fn served_at(&self) -> SocketAddr {
        self.encrypted.as_ref().unwrap_or(&self.port).addr()
    }

    pub(crate) const fn scheme(&self) -> &'static str {
        if self.encrypted.is_some() { "rediss" } else { "redis" }
    }

    pub fn password(&self) -> &str {
        &self.password
    }

    /// Opens a connection.
    pub async fn connect(&self) -> anyhow::Result<Connection> {
        Connection::open(self.addr(), &self.password).await
    }

    /// Sends one command on a new connection.
    pub async fn command<A: AsRef<[u8]>>(
        &self,
        parts: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Reply> {
        self.connect().await?.command(parts).await
    }

    /// Removes all data.
    pub async fn flush_all(&self) -> anyhow::Result<()> {
        self.command(["FLUSHALL", "SYNC"]).await.map(drop)
    }

    /// Returns the current contents.
    pub async fn snapshot(&self) -> anyhow::Result<Snapshot> {
        self.command(["SAVE"]).await?;
        let dump = self.dump();
        let bytes = fs::read(&dump).context("SAVE left no dump")?;
        fs::remove_file(dump)?;
        Ok(Snapshot(bytes))
    }

    /// Kills the server and starts it with earlier contents, like a failover to a replica that
    /// lags.
    pub async fn roll_back_to(&self, snapshot: &Snapshot) -> anyhow::Result<()> {
        self.kill9().await?;
        fs::write(self.dump(), &snapshot.0)?;
        self.start_again().await?;
        // Without the dump, the server is empty after its next start.
        fs::remove_file(self.dump())?;
        Ok(())
    }

    /// Stops the server as an operator does.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGTERM).await
    }

    pub async fn kill9(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGKILL).await
    }

    /// Starts the server after `stop` or `kill9`, on the same port.
    ///
    /// The server is empty, unless its settings keep data.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        // A server that is loading data refuses the command.
        self.service.start(|| async { self.command(["PING"]).await.is_ok() }).await
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

    fn dump(&self) -> std::path::PathBuf {
        self.service.path().join("dump.rdb")
    }
}

/// Adds a port with TLS, which also replication uses.
fn encrypt(configuration: &mut String, home: &Path, authority: &Authority) -> anyhow::Result<Port> {
    let port = Port::reserve()?;
    let issued = authority.issue(home)?;
    writeln!(
        configuration,
        "tls-port {}\ntls-auth-clients no\ntls-replication yes",
        port.number()
    )?;
    let files = [
        ("tls-cert-file", &issued.certificate),
        ("tls-key-file", &issued.key),
        ("tls-ca-cert-file", &authority.file()),
    ];
    for (name, file) in files {
        writeln!(configuration, "{name} \"{}\"", file.display())?;
    }
    Ok(port)
}
