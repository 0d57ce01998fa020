//! SeaweedFS for one test: an object store that speaks the S3 protocol, with one bucket, one
//! identity with generated keys, and without telemetry.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::ensure;
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    port::Port,
    process::{Home, Service, write_private},
    program::seaweed,
};

/// The bucket.
const BUCKET: &str = "qpq";

/// Time between two attempts to create the bucket.
const RETRY: Duration = Duration::from_millis(100);

/// A running object store. Dropping it ends it.
#[derive(Debug)]
pub struct SeaweedFs {
    service: Service,
    s3: Port,
    filer: Port,
    _others: Vec<Port>,
    access_key: String,
    secret_key: String,
}

impl SeaweedFs {
    pub async fn start() -> anyhow::Result<Self> {
        let program = seaweed()?;
        let home = Home::new("seaweed", Signal::SIGKILL)?;
        let (s3, filer) = (Port::reserve()?, Port::reserve()?);
        let (access_key, secret_key) = (key(20), key(40));
        let identities = home.path().join("s3.json");
        let json = format!(
            r#"{{"identities": [{{
                "name": "qpq",
                "credentials": [{{"accessKey": "{access_key}", "secretKey": "{secret_key}"}}],
                "actions": ["Admin", "Read", "Write", "List"]
            }}]}}"#
        );
        write_private(&identities, &json)?;

        let mut command = Command::new(program);
        command.args(["server", "-s3", "-filer", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
        command.arg(format!("-dir={}", home.path().display()));
        command.arg(format!("-s3.config={}", identities.display()));
        command.args(["-master.telemetry=false", "-volume.max=8", "-volume.preStopSeconds=0"]);
        command.args(["-master.volumeSizeLimitMB=128", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
        command.arg(format!("-s3.port={}", s3.number()));
        command.arg(format!("-filer.port={}", filer.number()));
        let mut others = Vec::new();
        for name in [
            "s3.port.grpc",
            "filer.port.grpc",
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
        ] {
            let port = Port::reserve()?;
            command.arg(format!("-{name}={}", port.number()));
            others.push(port);
        }
        let service = Service::new(home, command)?;
        let store = Self { service, s3, filer, _others: others, access_key, secret_key };
        store.start_again().await?;
        Ok(store)
    }

    /// Returns the URL for clients.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    pub fn addr(&self) -> SocketAddr {
        self.s3.addr()
    }

    pub const fn bucket(&self) -> &'static str {
        BUCKET
    }

    pub fn access_key(&self) -> &str {
        &self.access_key
    }

    pub fn secret_key(&self) -> &str {
        &self.secret_key
    }

    pub async fn kill9(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGKILL).await
    }

    /// Starts the store after `kill9`, on the same ports and data.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        let is_ready = || async {
            let is_ready = self.create_bucket().await.is_ok();
            if !is_ready {
                // Each attempt is several requests.
                tokio::time::sleep(RETRY).await;
            }
            is_ready
        };
        self.service.start(is_ready).await
    }

    /// Suspends the store: connections stay open without an answer.
    pub fn freeze(&self) {
        self.service.signal_all(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.service.signal_all(Signal::SIGCONT);
    }

    /// Returns the names of all objects, by the store's own interface without S3.
    pub async fn objects(&self) -> anyhow::Result<Vec<String>> {
        let mut objects = Vec::new();
        for directory in self.list(&format!("/buckets/{BUCKET}/")).await? {
            for name in self.list(&format!("/buckets/{BUCKET}/{directory}/")).await? {
                objects.push(format!("{directory}/{name}"));
            }
        }
        objects.sort();
        Ok(objects)
    }

    async fn list(&self, path: &str) -> anyhow::Result<Vec<String>> {
        let path = format!("{path}?limit=100000");
        let answer =
            request(self.filer.addr(), "GET", &path, "Accept: application/json\r\n").await?;
        ensure!(answer.contains(" 200 "), "not a list: {answer}");
        let names = answer.split("\"FullPath\":").skip(1).filter_map(|entry| {
            let path = entry.trim_start().strip_prefix('"')?.split('"').next()?;
            Some(path.rsplit('/').next()?.to_owned())
        });
        Ok(names.filter(|name| !name.starts_with('.')).collect())
    }

    /// Creates the bucket, which is a directory of the filer. Fails until all servers run.
    async fn create_bucket(&self) -> anyhow::Result<()> {
        let created =
            request(self.filer.addr(), "POST", &format!("/buckets/{BUCKET}/"), "").await?;
        // 409: the bucket exists.
        let exists = created.contains(" 201 ") || created.contains(" 409 ");
        ensure!(exists, "the bucket was not created: {created}");
        // Refused, because it is not signed: the identities are loaded.
        let refused = request(self.addr(), "GET", &format!("/{BUCKET}"), "").await?;
        ensure!(refused.contains(" 403 "), "not ready: {refused}");
        // Without a volume server no object can be written.
        let probe = format!("/buckets/{BUCKET}.probe");
        let written = request(self.filer.addr(), "PUT", &probe, "").await?;
        ensure!(written.contains(" 201 "), "not ready: {written}");
        Ok(())
    }
}

fn key(length: usize) -> String {
    use rand::{Rng as _, distributions::Alphanumeric, rngs::OsRng};
    OsRng.sample_iter(&Alphanumeric).take(length).map(char::from).collect()
}

/// Sends a request without a body. Returns the whole answer.
async fn request(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(addr).await?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n{headers}Content-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
