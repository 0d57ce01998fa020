//! Health: 802.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use qpq_domain::{StoreId, UnixMillis};
use qpq_ports::{Maintenance, NewHistory, OldSessions, StoreError, StoreResult, Swept};
use qpq_proto::{
    methods::Health,
    v1::{HealthRequest, HealthResponse},
};

use crate::harness::{Client, Server};

async fn health(client: &Client) -> HealthResponse {
    client.call::<Health>(HealthRequest {}).await.expect("anyone may ask")
}

/// A store whose checks fail while `fails` is set.
struct Failing {
    inner: Arc<dyn Maintenance>,
    fails: Arc<AtomicBool>,
}

#[async_trait]
impl Maintenance for Failing {
    async fn check(&self) -> StoreResult<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable("the disk is full"));
        }
        self.inner.check().await
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<Swept> {
        self.inner.sweep(now).await
    }

    fn store_id(&self) -> StoreId {
        self.inner.store_id()
    }

    async fn begin_history(&self, sessions: OldSessions) -> StoreResult<NewHistory> {
        self.inner.begin_history(sessions).await
    }
}

#[tokio::test]
async fn health_contains_identity_and_uptime_of_the_server() {
    let server = Server::with(|config| config.version = "1.2.3".into()).await;
    server.clock.advance(Duration::from_millis(61_999));
    let health = health(&server.connect()).await;
    assert_eq!((health.status.as_str(), health.uptime_secs), ("ok", 61));
    assert_eq!((health.version.as_str(), health.domain.as_str()), ("1.2.3", "example.org"));
    assert_eq!(health.server_key, &server.rpc.app().signer.public_key()[..]);
    assert_eq!(health.store_id, server.store_id());
}

#[tokio::test]
async fn health_is_degraded_after_a_failed_store_check_and_draining_takes_precedence() {
    let fails = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&fails);
    let server = Server::with_stores(
        |_| {},
        |mut stores| {
            stores.maintenance = Arc::new(Failing { inner: stores.maintenance, fails: switch });
            stores
        },
    )
    .await;
    let client = server.connect();
    server.rpc.check_store().await.expect("a store that commits");
    assert_eq!(health(&client).await.status, "ok");
    fails.store(true, Ordering::SeqCst);
    assert_eq!(health(&client).await.status, "ok", "it does not ask by itself");
    server.rpc.check_store().await.expect_err("a full disk");
    assert_eq!(health(&client).await.status, "degraded");
    fails.store(false, Ordering::SeqCst);
    server.rpc.check_store().await.expect("a store that commits");
    assert_eq!(health(&client).await.status, "ok");
    fails.store(true, Ordering::SeqCst);
    server.rpc.check_store().await.expect_err("a full disk");
    server.rpc.drain();
    assert_eq!(health(&client).await.status, "draining");
}
