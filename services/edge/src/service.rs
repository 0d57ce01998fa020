//! Connects the dispatcher to the transport: calls, deliveries and events.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use qpq_ports::{Clock, Lease};
use qpq_rpc::{Answer, ClientConnection, Events, Rpc};
use qpq_transport::{DeliveryObserver, EventSink, Peer, Reply, Service};
use qpq_wire::{Refusal, Request, RequestHeader};

/// The dispatcher as a service of the transport.
#[derive(Debug)]
pub(crate) struct Edge(pub(crate) Arc<Rpc>);

impl Service for Edge {
    type Connection = ClientConnection;

    fn connected(&self, peer: Peer, events: EventSink) -> Arc<ClientConnection> {
        self.0.connected(peer.addr, Arc::new(Sink(events)))
    }

    fn disconnected(&self, conn: &ClientConnection) {
        self.0.disconnected(conn);
    }

    fn admit(&self, conn: &ClientConnection, header: &RequestHeader) -> Result<(), Reply> {
        self.0
            .admit(conn, header.method_id, header.payload_len)
            .map_err(|answer| self.reply(answer))
    }

    async fn call(self: Arc<Self>, conn: Arc<ClientConnection>, request: Request) -> Reply {
        let answer = self.0.call(&conn, request.method_id, request.payload).await;
        self.reply(answer)
    }

    fn refuse(
        &self,
        conn: &ClientConnection,
        header: Option<&RequestHeader>,
        why: Refusal,
    ) -> Reply {
        self.reply(self.0.refuse(conn, header.map(|header| header.method_id), why))
    }

    fn is_short_of_memory(&self) -> bool {
        self.0.is_short_of_memory()
    }

    async fn draining(&self, _deadline: Duration) {
        self.0.drain();
        self.0.drained().await;
    }
}

impl Edge {
    fn reply(&self, answer: Answer) -> Reply {
        reply(answer, &self.0.app().clock)
    }
}

fn reply(Answer { status, payload, lease }: Answer, clock: &Arc<dyn Clock>) -> Reply {
    let on_delivery = lease.map(|lease| {
        Box::new(LeaseGuard { lease, clock: Arc::clone(clock) }) as Box<dyn DeliveryObserver>
    });
    Reply { status, payload, on_delivery }
}

/// The lease of the messages in a reply: completed once the client has the whole reply, released
/// otherwise.
struct LeaseGuard {
    lease: Box<dyn Lease>,
    clock: Arc<dyn Clock>,
}

impl DeliveryObserver for LeaseGuard {
    fn delivered(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if let Err(error) = self.lease.complete(self.clock.now()).await {
                let cause = &error as &dyn std::error::Error;
                tracing::warn!(cause, "delivered messages not removed, delivering them again");
            }
        })
    }

    fn lost(self: Box<Self>) -> BoxFuture<'static, ()> {
        // Dropping a lease releases its messages.
        drop(self);
        Box::pin(std::future::ready(()))
    }
}

/// The outgoing events of one connection.
struct Sink(EventSink);

impl Events for Sink {
    fn send(&self, event_type: u16, payload: Bytes) -> bool {
        self.0.send(event_type, payload).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use qpq_domain::{ChannelId, IdentityKey, Seq, StoreLimits, UnixMillis, Username};
    use qpq_ports::{
        Admission, Batch, NewAccount, NewMessage, PageLimit, ReadQuery, Reader, Stores,
        SystemClock, View,
    };
    use qpq_store_embedded::EmbeddedStore;

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
    const ALL: PageLimit = PageLimit { messages: 10, bytes: 1 << 20 };

    /// Creates a store with one message in one inbox.
    async fn one_message() -> (tempfile::TempDir, EmbeddedStore, ReadQuery) {
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(dir.path(), StoreLimits::default()).await.unwrap();
        let stores = store.stores();
        let inbox = IdentityKey::new([7; 32]);
        let username = Username::parse("alice").unwrap();
        let account = NewAccount {
            username,
            identity: inbox,
            opaque_record: vec![0; 192],
            admission: Admission::Open,
            now: NOW,
        };
        stores.accounts.register(account).await.unwrap();
        let message = NewMessage {
            sender: inbox,
            recipient: inbox,
            channel: ChannelId::default(),
            payload: Bytes::from_static(b"hello"),
            payload_sha256: [0; 32],
            message_id: None,
            now: NOW,
            ttl: Duration::from_secs(60),
        };
        stores.inboxes.enqueue(Batch::new(vec![message])).await.unwrap();
        (dir, store, ReadQuery { reader: Reader::single(inbox), view: View::All })
    }

    /// Returns the reply to a Fetch, and the number of messages in it.
    async fn fetched(stores: &Stores, read: ReadQuery) -> (Reply, usize) {
        let lease = stores.inboxes.lease(read, ALL, NOW).await.unwrap();
        let shown = lease.page().envelopes.len();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        (reply(Answer { status: 0, payload: Bytes::new(), lease: Some(lease) }, &clock), shown)
    }

    #[tokio::test]
    async fn delivered_messages_are_removed() {
        let (_dir, store, read) = one_message().await;
        let stores = store.stores();
        let (reply, shown) = fetched(&stores, read).await;
        assert_eq!(shown, 1);
        reply.on_delivery.unwrap().delivered().await;
        let left = stores.inboxes.peek(read, Seq::ZERO, ALL, NOW).await.unwrap();
        assert_eq!(left.envelopes.len(), 0);
    }

    #[tokio::test]
    async fn lost_and_unsent_messages_are_back_in_the_inbox() {
        let (_dir, store, read) = one_message().await;
        let stores = store.stores();
        let (lost, shown) = fetched(&stores, read).await;
        assert_eq!(shown, 1);
        assert_eq!(fetched(&stores, read).await.1, 0, "leased");
        lost.on_delivery.unwrap().lost().await;
        let (unsent, shown) = fetched(&stores, read).await;
        assert_eq!(shown, 1);
        drop(unsent);
        assert_eq!(fetched(&stores, read).await.1, 1);
    }
}
