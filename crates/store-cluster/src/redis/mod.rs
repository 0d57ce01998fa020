//! Redis, for state that may be lost: inboxes that are being read, waiting edges, leases, rate
//! limits, sessions in use. All of it can be flushed, evicted or rolled back at any time. Either a
//! comparison with Postgres detects such a loss, or the loss costs only a delay.

mod breaker;
mod link;
mod node;
pub(crate) mod queue;
mod sentinel;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use qpq_ports::{StoreError, StoreResult};
use redis::{Cmd, FromRedisValue, RedisError, Script, aio::ConnectionLike as _};
use tokio::time::{Instant, sleep, timeout};
use tracing::{Instrument as _, field::Empty};

use crate::{Config, ConnectError, error::Server, metrics as names};
use breaker::{Breaker, Sign};
use link::Link;

pub(crate) use link::check_url;

/// The connection that all calls share: their commands are pipelined. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Redis {
    link: Link,
    breaker: Arc<Breaker>,
    namespace: Arc<str>,
    timeout: Duration,
}

/// Time between two probes of a Redis that does not answer.
const PROBE: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
#[error("Redis did not answer within {0:?}")]
struct NoAnswer(Duration);

impl Redis {
    /// Connects, and checks the version.
    pub(crate) async fn connect(config: &Config) -> Result<Self, ConnectError> {
        let link = Link::connect(config).await?;
        let redis = Self {
            link,
            breaker: Arc::new(Breaker::new(config.redis_timeout, Instant::now())),
            namespace: config.namespace.as_str().into(),
            timeout: config.redis_timeout,
        };
        redis.check_version().await?;
        Ok(redis)
    }

    /// Returns the key for `name`, which has a `{hash tag}` if several keys must be on one node.
    pub(crate) fn key(&self, name: std::fmt::Arguments<'_>) -> String {
        format!("{}:{name}", self.namespace)
    }

    /// Returns whether all keys of a call must be in one slot.
    fn has_slots(&self) -> bool {
        matches!(self.link, Link::Cluster(_))
    }

    /// Runs a script; `op` is its label in metrics.
    pub(crate) async fn script<T: FromRedisValue>(
        &self,
        op: &'static str,
        script: &Script,
        keys: &[String],
        args: &[Bytes],
    ) -> StoreResult<T> {
        let mut invocation = script.prepare_invoke();
        for key in keys {
            invocation.key(key.as_str());
        }
        for arg in args {
            invocation.arg(&arg[..]);
        }
        let mut link = self.link.clone();
        self.measured(op, invocation.invoke_async(&mut link)).await
    }

    /// Runs one command.
    pub(crate) async fn command<T: FromRedisValue>(
        &self,
        op: &'static str,
        command: &Cmd,
    ) -> StoreResult<T> {
        let mut link = self.link.clone();
        self.measured(op, async {
            redis::from_redis_value(link.req_packed_command(command).await?).map_err(Into::into)
        })
        .await
    }

    async fn measured<T>(
        &self,
        op: &'static str,
        work: impl Future<Output = Result<T, RedisError>>,
    ) -> StoreResult<T> {
        self.breaker.admit().map_err(StoreError::unavailable)?;
        let begun = Instant::now();
        let span = tracing::debug_span!(
            target: "qpq::store",
            "redis",
            otel.name = op,
            otel.kind = "client",
            otel.status_code = Empty,
            db.system.name = "redis"
        );
        let outcome = self.answer(work).instrument(span.clone()).await;
        metrics::histogram!(names::REDIS_SECONDS, "op" => op).record(begun.elapsed());
        if outcome.is_err() {
            span.record("otel.status_code", "ERROR");
            metrics::counter!(names::REDIS_ERRORS, "op" => op).increment(1);
        }
        outcome
    }

    /// Returns the outcome of `work`, and passes it to the breaker.
    async fn answer<T>(&self, work: impl Future<Output = Result<T, RedisError>>) -> StoreResult<T> {
        let answer = timeout(self.timeout, work).await;
        let sign = answer.as_ref().map_or(Sign::Silent, Sign::of);
        self.breaker.note(sign, Instant::now());
        match answer {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(StoreError::unavailable(error)),
            Err(_) => Err(StoreError::unavailable(NoAnswer(self.timeout))),
        }
    }

    /// Probes a Redis that does not answer, until it answers. Never completes.
    pub(crate) async fn probe(self) {
        let mut ask = Cmd::new();
        ask.arg("GET").arg(self.key(format_args!("check")));
        loop {
            self.breaker.opened().await;
            let mut link = self.link.clone();
            // Only the breaker uses the outcome.
            let _ = self.answer(link.req_packed_command(&ask)).await;
            sleep(PROBE).await;
        }
    }

    async fn check_version(&self) -> Result<(), ConnectError> {
        // A script returns the version on every kind of deployment. INFO would need a call to each
        // node.
        let script = Script::new("return redis.REDIS_VERSION or '6'");
        let mut invocation = script.prepare_invoke();
        invocation.key(self.key(format_args!("version")));
        let mut link = self.link.clone();
        let found: String = match timeout(self.timeout, invocation.invoke_async(&mut link)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return Err(node::failed(&error)),
            Err(_) => return Err(Server::Redis.unreachable(NoAnswer(self.timeout))),
        };
        let major: u32 =
            found.split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default();
        if major >= 7 {
            Ok(())
        } else {
            Err(ConnectError::TooOld { server: "Redis", found, needed: "7.0" })
        }
    }
}
