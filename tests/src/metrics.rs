//! The metrics of a server process, as Prometheus reads them.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::process::Server;

/// One page of metrics.
#[derive(Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Reads the page of a server whose banner has the address of its HTTP listener.
    pub async fn of(server: &Server) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(http(server)?).await?;
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .await?;
        let mut page = String::new();
        stream.read_to_string(&mut page).await?;
        Ok(Self(page))
    }

    /// Returns the sum of the series of `name` whose labels contain `label`, which may be empty.
    pub fn sum(&self, name: &str, label: &str) -> f64 {
        let series = self.0.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        series
            .filter(|(labels, _)| labels.is_empty() || labels.starts_with('{'))
            .filter(|(labels, _)| labels.contains(label))
            .filter_map(|(_, value)| value.parse::<f64>().ok())
            .sum()
    }
}

fn http(server: &Server) -> anyhow::Result<SocketAddr> {
    let url = server.said.iter().find_map(|line| line.split_once("http://"));
    let (_, rest) = url.context("the banner has no HTTP address")?;
    let address = rest.split('/').next().unwrap_or_default();
    address.parse().context("the banner has no HTTP address")
}
