//! Starts Postgres, Redis and NATS for trying things out by hand, prints how to reach them, and ends them with itself.

use std::io::Write as _;

use qpq_test_services::{Nats, Postgres, Redis};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let postgres = Postgres::start().await?;
    let redis = Redis::start().await?;
    let nats = Nats::start().await?;
    let mut out = std::io::stdout();
    writeln!(out, "{}\n{}\n{}", postgres.url(), redis.url(), nats.url())?;
    out.flush()?;
    tokio::signal::ctrl_c().await?;
    Ok(())
}
