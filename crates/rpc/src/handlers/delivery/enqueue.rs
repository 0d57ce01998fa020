//! Enqueue (200): sends one message.

use qpq_ports::Batch;
use qpq_proto::{methods, v1};

use super::message::{Accepted, accepted, charge, parse};
use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for methods::Enqueue {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::EnqueueRequest) -> Handled<Self> {
        let message = parse(cx.app, &caller.identity, &request, cx.now)?;
        let recipient = message.recipient;
        let size = request.payload.len() as u64;
        drop(request);
        charge(cx, caller.account, 1, size).await?;
        let batch = Batch::new(vec![message]);
        let outcome = cx.app.stores.inboxes.enqueue(batch).await?.into_iter().next();
        let outcome = outcome.ok_or_else(|| Error::internal("the store returned no outcome"))?;
        let Accepted { seq, delivery_proof, duplicate } = accepted(cx.app, &recipient, outcome)?;
        Ok(v1::EnqueueResponse { seq, delivery_proof, duplicate }.into())
    }
}
