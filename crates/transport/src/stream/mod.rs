//! One stream: reads a request, runs its call, writes the reply and observes its delivery.

mod reply;
mod request;

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt;
use qpq_wire::{Refusal, Request, RequestHeader};
use quinn::{RecvStream, SendStream, VarInt};

use crate::{
    context::{ConnectionContext, OpenStream},
    service::{Reply, Service},
};
use reply::ReplyStream;
use request::{Received, RequestStream};

/// The code of all resets and stops, which has no meaning: the reply contains the error.
const NO_CODE: VarInt = VarInt::from_u32(0);

/// Serves one stream to its end.
///
/// Not an `async fn`: its future would contain space for the arguments and again for the values
/// built from them, and each waiting call occupies one of these futures.
pub(crate) fn serve<S: Service>(
    stream: OpenStream<S>,
    send: SendStream,
    recv: RecvStream,
) -> impl Future<Output = ()> + Send {
    let reply_stream = ReplyStream::new(send);
    let mut request_stream = RequestStream::new(recv);
    async move {
        let connection = &*stream.connection;
        let mut memory = connection.request_memory.reserve();
        let reply = match request::receive(connection, &mut request_stream, &mut memory).await {
            Received::Request(request) => {
                match run(connection, &reply_stream, request_stream.header(), request).await {
                    Some(reply) => reply,
                    None => return connection.server.metrics.calls_cancelled.increment(1),
                }
            }
            Received::Refused(reply) => reply,
            Received::Cancelled => return,
        };
        let header = request_stream.header();
        // If the request has not ended, this drop asks the client to send no more of it.
        drop(request_stream);
        drop(memory);
        reply::send(connection, reply_stream, header, reply).await;
    }
}

/// Runs the call. Returns `None` if it was cancelled.
async fn run<S: Service>(
    connection: &ConnectionContext<S>,
    reply_stream: &ReplyStream,
    header: Option<RequestHeader>,
    request: Request,
) -> Option<Reply> {
    let service = Arc::clone(&connection.server.service);
    let state = Arc::clone(&connection.state);
    // Boxed, so that the future is not as large as the largest call while it reads and replies.
    let mut call = Box::pin(
        AssertUnwindSafe(async move { service.call(state, request).await }).catch_unwind(),
    );
    // Polled first: most calls end immediately, and then the stream need not be watched.
    let reply = tokio::select! {
        biased;
        reply = &mut call => reply,
        _ = reply_stream.stopped() => return None,
    };
    Some(reply.unwrap_or_else(|_| {
        connection.server.metrics.calls_panicked.increment(1);
        let method_id = header.map(|header| header.method_id);
        tracing::error!(method_id, "call panicked");
        refuse(connection, header.as_ref(), Refusal::Internal)
    }))
}

/// Counts a refusal and returns the service's reply to it.
fn refuse<S: Service>(
    connection: &ConnectionContext<S>,
    header: Option<&RequestHeader>,
    why: Refusal,
) -> Reply {
    connection.server.metrics.requests_refused(why).increment(1);
    connection.server.service.refuse(&connection.state, header, why)
}
