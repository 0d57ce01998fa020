//! The dispatcher as the transport wants it: calls become calls, leases become deliveries, events find their stream.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use qpq_ports::Lease;
use qpq_rpc::{Answer, Connection, Events, Rpc};
use qpq_transport::{Delivery, EventSink, Peer, Refusal, Reply, Service};
use qpq_wire::{Request, RequestHeader};

/// The dispatcher behind QUIC.
#[derive(Debug)]
pub(crate) struct Edge(pub(crate) Arc<Rpc>);

impl Service for Edge {
    type Connection = Connection;

    fn connected(&self, peer: Peer, events: EventSink) -> Arc<Connection> {
        self.0.connected(peer.addr, Arc::new(Sink(events)))
    }

    fn disconnected(&self, conn: &Connection) {
        self.0.disconnected(conn);
    }

    fn admit(&self, conn: &Connection, header: &RequestHeader) -> Result<(), Reply> {
        self.0.admit(conn, header.method_id, header.payload_len).map_err(reply)
    }

    async fn call(self: Arc<Self>, conn: Arc<Connection>, request: Request) -> Reply {
        reply(self.0.call(&conn, request.method_id, request.payload).await)
    }

    fn refuse(&self, conn: &Connection, header: Option<&RequestHeader>, why: Refusal) -> Reply {
        let why = match why {
            Refusal::TooLarge => qpq_rpc::Refusal::TooLarge,
            Refusal::Malformed => qpq_rpc::Refusal::Malformed,
            Refusal::Timeout => qpq_rpc::Refusal::Timeout,
            Refusal::Internal => qpq_rpc::Refusal::Internal,
        };
        reply(self.0.refuse(conn, header.map(|header| header.method_id), why))
    }

    async fn draining(&self, _deadline: Duration) {
        self.0.drain();
        self.0.drained().await;
    }
}

fn reply(Answer { status, payload, lease }: Answer) -> Reply {
    let on_delivery = lease.map(|lease| Box::new(Settlement(lease)) as Box<dyn Delivery>);
    Reply { status, payload, on_delivery }
}

/// Removes the messages that a client has got, and gives back those that it may not have.
struct Settlement(Box<dyn Lease>);

impl Delivery for Settlement {
    fn delivered(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if let Err(error) = self.0.settle().await {
                let cause = &error as &dyn std::error::Error;
                tracing::warn!(
                    cause,
                    "delivered messages could not be removed: they will be delivered again"
                );
            }
        })
    }

    fn lost(self: Box<Self>) -> BoxFuture<'static, ()> {
        // The drop of a lease releases it.
        drop(self);
        Box::pin(std::future::ready(()))
    }
}

/// One connection's events.
struct Sink(EventSink);

impl Events for Sink {
    fn send(&self, event_type: u16, payload: Bytes) -> bool {
        self.0.send(event_type, payload).is_ok()
    }
}
