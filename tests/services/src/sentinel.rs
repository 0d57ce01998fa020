//! A Redis with a replica and a Sentinel, which promotes the replica on request or when the primary
//! fails.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};
use tokio::time::{Instant, sleep};

use crate::{
    authority::Authority,
    process::{TIMEOUT, in_url, new_password},
    redis::{Redis, SENTINEL},
    resp::Reply,
};

/// The name of the pair in the Sentinel.
const SERVICE: &str = "qpq";
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running primary with its replica and a Sentinel. Dropping it ends them.
#[derive(Debug)]
pub struct RedisSentinel {
    pair: [Redis; 2],
    sentinel: Redis,
}

impl RedisSentinel {
    pub async fn start() -> anyhow::Result<Self> {
        Self::launch(None).await
    }

    /// Starts all three with TLS, for clients and between them.
    pub async fn start_encrypted(authority: &Authority) -> anyhow::Result<Self> {
        Self::launch(Some(authority)).await
    }

    async fn launch(authority: Option<&Authority>) -> anyhow::Result<Self> {
        let password = new_password();
        let quick = ("repl-diskless-sync-delay", "0");
        let first = Redis::launch(&password, &[quick], &[], authority).await?;
        let port = first.served_at().port();
        let replicaof = format!("127.0.0.1 {port}");
        let second =
            Redis::launch(&password, &[quick, ("replicaof", &replicaof)], &[], authority).await?;
        let sentinel = Redis::launch(
            &password,
            &[
                ("sentinel monitor", &format!("{SERVICE} 127.0.0.1 {port} 1")),
                ("sentinel auth-pass", &format!("{SERVICE} {password}")),
                ("sentinel down-after-milliseconds", &format!("{SERVICE} 500")),
                ("sentinel failover-timeout", &format!("{SERVICE} 2000")),
            ],
            &[SENTINEL],
            authority,
        )
        .await?;
        let all = Self { pair: [first, second], sentinel };
        all.wait_for_replica().await?;
        Ok(all)
    }

    /// Waits until the Sentinel knows a connected replica, which it can promote.
    pub async fn wait_for_replica(&self) -> anyhow::Result<()> {
        self.wait_for("the Sentinel to know a connected replica", || async {
            let replicas = self.sentinel.command(["SENTINEL", "REPLICAS", SERVICE]).await?;
            Ok(replicas.array()?.first().is_some_and(|fields| {
                // A replica that is down has further flags, and keeps its last link status.
                field(fields, "flags") == Some("slave")
                    && field(fields, "master-link-status") == Some("ok")
            }))
        })
        .await
    }

    /// Returns the name of the primary for clients of the Sentinel.
    pub const fn service(&self) -> &'static str {
        SERVICE
    }

    /// Returns the Sentinel. Primary, replica and Sentinel have the same password.
    pub fn sentinel(&self) -> &Redis {
        &self.sentinel
    }

    /// Returns the URL in the store's format, with the Sentinel and the name.
    pub fn url(&self) -> String {
        let sentinel = &self.sentinel;
        format!(
            "{}+sentinel://:{}@{}/{SERVICE}",
            sentinel.scheme(),
            in_url(sentinel.password()),
            sentinel.served_at()
        )
    }

    /// Returns both servers.
    pub const fn pair(&self) -> &[Redis; 2] {
        &self.pair
    }

    /// Returns the current primary.
    pub async fn primary(&self) -> anyhow::Result<&Redis> {
        let addr = self.primary_addr().await?;
        self.pair
            .iter()
            .find(|redis| redis.served_at() == addr)
            .context("the Sentinel names an unknown server")
    }

    /// Returns the server that is not the primary.
    pub async fn replica(&self) -> anyhow::Result<&Redis> {
        let addr = self.primary_addr().await?;
        self.pair.iter().find(|redis| redis.served_at() != addr).context("there are two")
    }

    /// Swaps primary and replica, and waits until the new primary accepts writes.
    pub async fn fail_over(&self) -> anyhow::Result<()> {
        let old = self.primary_addr().await?;
        // The Sentinel refuses while an earlier failover is in progress.
        self.wait_for("the Sentinel to accept the failover", || async {
            Ok(self.sentinel.command(["SENTINEL", "FAILOVER", SERVICE]).await.is_ok())
        })
        .await?;
        self.wait_for_other_than(old).await
    }

    /// Kills the primary and waits until the replica is promoted. The killed server may be started
    /// again, and becomes the replica.
    pub async fn lose_primary(&self) -> anyhow::Result<()> {
        let old = self.primary().await?;
        old.kill9().await?;
        self.wait_for_other_than(old.served_at()).await
    }

    async fn wait_for_other_than(&self, old: SocketAddr) -> anyhow::Result<()> {
        self.wait_for("another primary", || async {
            let primary = self.primary().await?;
            let role = primary.command(["ROLE"]).await?;
            Ok(primary.served_at() != old
                && role.array()?.first() == Some(&Reply::Bulk(b"master".to_vec())))
        })
        .await
    }

    async fn primary_addr(&self) -> anyhow::Result<SocketAddr> {
        let reply = self.sentinel.command(["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]).await?;
        let [host, port] = reply.array()? else {
            bail!("the Sentinel names no primary: {reply:?}")
        };
        Ok(format!("{}:{}", host.text()?, port.text()?).parse()?)
    }

    /// Waits until `is_so` returns true. Errors are retried, because the server may be down.
    async fn wait_for<F>(&self, what: &str, is_so: impl Fn() -> F) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<bool>>,
    {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let answer = is_so().await;
            if let Ok(true) = answer {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("waited {TIMEOUT:?} for {what}; the last answer was {answer:?}");
            }
            sleep(POLL_INTERVAL).await;
        }
    }
}

/// Returns the value of `name` in a list of names and values.
fn field<'a>(fields: &'a Reply, name: &str) -> Option<&'a str> {
    let fields = fields.array().ok()?;
    let at = fields.iter().position(|field| field.text().ok() == Some(name))?;
    fields.get(at + 1)?.text().ok()
}
