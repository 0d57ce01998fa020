//! Rate limits, counted in this process.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_ports::{Bucket, LimitKey, RateLimiter, StoreResult, Verdict};

use crate::store::EmbeddedStore;

#[async_trait]
impl RateLimiter for EmbeddedStore {
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict> {
        Ok(self.limiter.take(key, bucket, cost, now))
    }

    async fn remember(
        &self,
        key: LimitKey,
        lifetime: Duration,
        now: UnixMillis,
    ) -> StoreResult<()> {
        self.limiter.remember(key, lifetime, now);
        Ok(())
    }

    async fn remembers(&self, key: LimitKey, now: UnixMillis) -> StoreResult<bool> {
        Ok(self.limiter.remembers(&key, now))
    }
}
