//! A Redis with a replica and a Sentinel that makes the replica primary, by order or when the
//! primary is gone.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};
use tokio::time::{Instant, sleep};

use crate::{
    authority::Authority,
    process::{PATIENCE, in_url, new_password},
    redis::{Redis, SENTINEL},
    resp::Reply,
};

/// What the Sentinel calls the pair.
const SERVICE: &str = "qpq";
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A primary, its replica and a Sentinel, all running. Dropping it stops them.
#[derive(Debug)]
pub struct RedisSentinel {
    pair: [Redis; 2],
    sentinel: Redis,
}

impl RedisSentinel {
    pub async fn start() -> anyhow::Result<Self> {
        Self::launch(None).await
    }

    /// All three with TLS, for clients and among themselves.
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

    /// Returns once the Sentinel knows a replica that follows, so that it can take the primary's
    /// place.
    pub async fn wait_for_replica(&self) -> anyhow::Result<()> {
        self.wait_for("the Sentinel to know a replica that follows", || async {
            let replicas = self.sentinel.command(["SENTINEL", "REPLICAS", SERVICE]).await?;
            Ok(replicas.array()?.first().is_some_and(|fields| {
                // One that is down has further flags, and the link as it last was.
                field(fields, "flags") == Some("slave")
                    && field(fields, "master-link-status") == Some("ok")
            }))
        })
        .await
    }

    /// What clients ask the Sentinel for.
    pub const fn service(&self) -> &'static str {
        SERVICE
    }

    /// How a client connects to the Sentinel; primary, replica and Sentinel have one password.
    pub fn sentinel(&self) -> &Redis {
        &self.sentinel
    }

    /// The Sentinel and the name in one, as the store takes it.
    pub fn url(&self) -> String {
        let sentinel = &self.sentinel;
        format!(
            "{}+sentinel://:{}@{}/{SERVICE}",
            sentinel.scheme(),
            in_url(sentinel.password()),
            sentinel.served_at()
        )
    }

    /// The two that change places.
    pub const fn pair(&self) -> &[Redis; 2] {
        &self.pair
    }

    /// The one that the Sentinel names as primary now.
    pub async fn primary(&self) -> anyhow::Result<&Redis> {
        let addr = self.primary_addr().await?;
        self.pair
            .iter()
            .find(|redis| redis.served_at() == addr)
            .context("the Sentinel names a stranger")
    }

    /// The other one: it follows the primary, or it is down.
    pub async fn replica(&self) -> anyhow::Result<&Redis> {
        let addr = self.primary_addr().await?;
        self.pair.iter().find(|redis| redis.served_at() != addr).context("there are two")
    }

    /// Lets the two change places; returns once the new primary is named and takes writes.
    pub async fn fail_over(&self) -> anyhow::Result<()> {
        let old = self.primary_addr().await?;
        // Refused while an earlier one is still being settled.
        self.wait_for("the Sentinel to take the order", || async {
            Ok(self.sentinel.command(["SENTINEL", "FAILOVER", SERVICE]).await.is_ok())
        })
        .await?;
        self.wait_for_other_than(old).await
    }

    /// Kills the primary; returns once the replica has taken its place. The killed one may be
    /// started again: it follows.
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

    /// An error is no answer: who is asked may be down just now.
    async fn wait_for<F>(&self, what: &str, is_so: impl Fn() -> F) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<bool>>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = is_so().await;
            if let Ok(true) = answer {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("waited {PATIENCE:?} for {what}; the last answer was {answer:?}");
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// A value in a list of names and values.
fn field<'a>(fields: &'a Reply, name: &str) -> Option<&'a str> {
    let fields = fields.array().ok()?;
    let at = fields.iter().position(|field| field.text().ok() == Some(name))?;
    fields.get(at + 1)?.text().ok()
}
