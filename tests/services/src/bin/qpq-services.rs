//! Starts Postgres, Redis and NATS for experiments and prints their URLs. The servers end when this
//! program ends.

use std::io::Write as _;

use qpq_test_services::{Nats, Postgres, Redis};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let postgres = Postgres::start().await?;
    writeln!(out, "{}", postgres.url())?;
    let redis = Redis::start().await?;
    writeln!(out, "{}", redis.url())?;
    let nats = Nats::start().await?;
    writeln!(out, "{}", nats.url())?;
    tokio::signal::ctrl_c().await?;
    Ok(())
}
