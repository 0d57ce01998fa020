//! Measures how cost grows with the amount of stored data: CPU time of an Enqueue and of a Fetch
//! through the embedded store's ports in this process, with few and many inboxes, and with short
//! and long ones.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use qpq_domain::{ChannelId, IdentityKey, MessageId, Seq, StoreLimits, UnixMillis, Username};
use qpq_ports::{
    Admission, Batch, NewAccount, NewMessage, PageLimit, ReadQuery, Reader, Stores, View,
};
use qpq_store_embedded::EmbeddedStore;
use sha2::{Digest as _, Sha256};

use crate::floor::own_cpu;

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
const CONCURRENCY: usize = 256;

/// CPU microseconds per operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) enqueue: f64,
    pub(crate) fetch: f64,
}

/// A store with `inboxes` inboxes to measure.
pub(crate) struct Subject {
    store: EmbeddedStore,
    stores: Stores,
    inboxes: usize,
}

fn identity(i: usize) -> IdentityKey {
    IdentityKey::new(Sha256::digest(i.to_be_bytes()).into())
}

impl Subject {
    pub(crate) async fn with_inboxes(dir: &Path, inboxes: usize) -> anyhow::Result<Self> {
        let store = EmbeddedStore::open(dir, StoreLimits::default()).await?;
        let stores = store.stores();
        stream::iter(0..inboxes)
            .map(|i| {
                let accounts = Arc::clone(&stores.accounts);
                async move {
                    accounts
                        .register(NewAccount {
                            username: Username::parse(&format!("user-{i}"))?,
                            identity: identity(i),
                            opaque_record: vec![1; 192],
                            admission: Admission::Open,
                            now: NOW,
                        })
                        .await?;
                    anyhow::Ok(())
                }
            })
            .buffer_unordered(CONCURRENCY)
            .try_collect::<()>()
            .await?;
        Ok(Self { store, stores, inboxes })
    }

    pub(crate) async fn close(self) {
        self.store.close().await;
    }

    fn message(&self, i: usize, recipient: usize) -> NewMessage {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(i as u64).to_be_bytes());
        id[8..].copy_from_slice(&rand::random::<[u8; 8]>());
        NewMessage {
            sender: identity(0),
            recipient: identity(recipient),
            channel: ChannelId::DEFAULT,
            payload: Bytes::from_static(&[7; 1024]),
            payload_sha256: [9; 32],
            message_id: Some(MessageId::new(id)),
            now: NOW,
            ttl: Duration::from_secs(86_400),
        }
    }

    /// Adds `depth` messages to each of the first `readers` inboxes.
    pub(crate) async fn deepen(&self, readers: usize, depth: usize) -> anyhow::Result<()> {
        for reader in 0..readers {
            for from in (0..depth).step_by(500) {
                let batch =
                    (from..depth.min(from + 500)).map(|i| self.message(i, reader)).collect();
                self.stores.inboxes.enqueue(Batch::new(batch)).await?;
            }
        }
        Ok(())
    }

    /// Measures `times` Enqueues, `CONCURRENCY` at a time, spread over the inboxes or over the
    /// first `readers`, then as many Fetches of one message from the same inboxes.
    pub(crate) async fn costs(&self, times: usize, readers: Option<usize>) -> anyhow::Result<Cost> {
        // A stride coprime to the number of inboxes visits all of them in an order that defeats
        // caches.
        let inbox = |i: usize| readers.map_or((i * 7_919) % self.inboxes, |r| i % r);
        let before = own_cpu();
        stream::iter(0..times)
            .map(|i| self.stores.inboxes.enqueue(Batch::new(vec![self.message(i, inbox(i))])))
            .buffer_unordered(CONCURRENCY)
            .try_collect::<Vec<_>>()
            .await?;
        let enqueue = (own_cpu() - before).as_secs_f64() * 1e6 / times as f64;

        let before = own_cpu();
        stream::iter(0..times)
            .map(|i| async move {
                let read =
                    ReadQuery { reader: Reader::single(identity(inbox(i))), view: View::All };
                let lease = self
                    .stores
                    .inboxes
                    .lease(read, PageLimit { messages: 1, bytes: 4 << 20 }, NOW)
                    .await?;
                anyhow::ensure!(
                    lease.page().envelopes.len() <= 1
                        && lease.page().envelopes.iter().all(|e| e.seq > Seq::ZERO)
                );
                lease.complete(NOW).await?;
                anyhow::Ok(())
            })
            .buffer_unordered(if readers.is_some() { 1 } else { CONCURRENCY })
            .try_collect::<Vec<_>>()
            .await?;
        let fetch = (own_cpu() - before).as_secs_f64() * 1e6 / times as f64;
        Ok(Cost { enqueue, fetch })
    }
}
