//! `qpq health`: shows the health of the server.

use std::{
    io::{self, Write},
    time::Duration,
};

use qpq_client::{Client, Fingerprint};
use serde::Serialize;
use tokio::time::Instant;

use super::opened;
use crate::{
    compose::Context,
    entry,
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

#[derive(Debug, Serialize)]
struct Health {
    server: String,
    status: String,
    version: String,
    uptime_secs: u64,
    rtt_ms: f64,
    fingerprint: String,
    domain: String,
    /// The key with which the server signs delivery proofs.
    server_key: String,
}

impl Report for Health {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { server, status, version, uptime_secs, rtt_ms, fingerprint, .. } = self;
        let uptime = entry::span(Duration::from_secs(*uptime_secs));
        let (status, version) = (text::line(status), text::line(version));
        writeln!(
            out,
            "{server} is {}: version {version}, up {uptime}, {rtt_ms:.1} ms away",
            style.bold(status)
        )?;
        writeln!(out, "fingerprint {fingerprint}")
    }
}

pub(crate) async fn health(context: &Context) -> Result<(), CliError> {
    let options = context.any_options()?;
    let server = options.server.clone();
    let client = Client::new(options).map_err(qpq_client::CallError::from)?;
    let health = context.progress.during("connecting", ask(&client, server)).await;
    client.close().await;
    let health = health?;
    context.output.report(&health)?;
    match health.status.as_str() {
        "ok" => Ok(()),
        status => Err(CliError::new(
            Exit::Failure,
            "client.unhealthy",
            format_args!("the server is {}", text::line(status)),
        )
        .hint("try again later, or ask its operator")),
    }
}

async fn ask(client: &Client, server: String) -> Result<Health, CliError> {
    let fingerprint: Fingerprint = opened::connect(client).await?;
    let asked = Instant::now();
    let answer = client.health().await?;
    let rtt_ms = (asked.elapsed().as_secs_f64() * 10_000.0).round() / 10.0;
    Ok(Health {
        server,
        status: answer.status,
        version: answer.version,
        uptime_secs: answer.uptime_secs,
        rtt_ms,
        fingerprint: fingerprint.to_string(),
        domain: answer.domain,
        server_key: hex::encode(&answer.server_key),
    })
}
