//! Sending one message (200), and the steps that it shares with sending many (`batch`).
//!
//! A payload may be empty: the server does not look into it. The proof is signed when the store has
//! committed, never before, from what the store kept; so a repeated request is answered with the
//! first one's seq and proof.

use bytes::Bytes;
use prost::Message as _;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use qpq_ports::{Batch, Enqueued, NewMessage, Receipt};
use qpq_proto::{LimitClass, convert, methods, v1};
use sha2::{Digest as _, Sha256};

use super::page;
use crate::{Answered, App, Caller, Cx, Error, Handler};

/// Bytes from which on a call is taken from the budget of bytes. Smaller ones are bounded well
/// enough by their messages, and need no second look at a budget.
const COUNTED_BYTES: u64 = 16 << 10;

impl Handler for methods::Enqueue {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::EnqueueRequest,
    ) -> Result<Answered<v1::EnqueueResponse>, Error> {
        let message = parse(cx.app, &caller.identity, &request, cx.now)?;
        let recipient = message.recipient;
        let size = request.payload.len() as u64;
        drop(request);
        charge(cx, caller.account, 1, size).await?;
        let outcome =
            cx.app.stores.inboxes.enqueue(Batch::new(vec![message])).await?.into_iter().next();
        let outcome = outcome.ok_or_else(|| Error::internal("the store answered no outcome"))?;
        let Accepted { seq, delivery_proof, duplicate } = accepted(cx.app, &recipient, outcome)?;
        Ok(v1::EnqueueResponse { seq, delivery_proof, duplicate }.into())
    }
}

/// Takes a call that sends so many messages and bytes from the sender's budgets. One message has
/// been taken with the call.
pub(super) async fn charge(
    cx: Cx<'_>,
    sender: AccountId,
    messages: usize,
    bytes: u64,
) -> Result<(), Error> {
    let more = u32::try_from(messages.saturating_sub(1)).unwrap_or(u32::MAX);
    cx.charge(LimitClass::Send, sender, more).await?;
    if bytes < COUNTED_BYTES {
        return Ok(());
    }
    cx.charge(LimitClass::SendBytes, sender, u32::try_from(bytes).unwrap_or(u32::MAX)).await
}

/// A message of `sender`, in the form that the store accepts.
pub(super) fn parse(
    app: &App,
    sender: &IdentityKey,
    request: &v1::EnqueueRequest,
    now: UnixMillis,
) -> Result<NewMessage, Error> {
    let recipient = convert::identity_key(&request.recipient_key, "recipient_key")?;
    let channel = convert::channel_id(&request.channel_id, "channel_id")?;
    let message_id = convert::message_id(&request.message_id, "message_id")?;
    let limits = &app.config.delivery;
    if request.payload.len() > limits.max_payload.min(page::MAX_PAYLOAD) {
        return Err(Error::PayloadTooLarge);
    }
    Ok(NewMessage {
        sender: *sender,
        recipient,
        channel,
        payload: request.payload.clone(),
        payload_sha256: Sha256::digest(&request.payload).into(),
        message_id,
        now,
        ttl: limits.ttl(request.ttl_secs),
    })
}

/// The receipt of an accepted message, as its sender gets it.
pub(super) struct Accepted {
    pub(super) seq: u64,
    pub(super) delivery_proof: Bytes,
    pub(super) duplicate: bool,
}

pub(super) fn accepted(
    app: &App,
    recipient: &IdentityKey,
    outcome: Enqueued,
) -> Result<Accepted, Error> {
    let of = |receipt: &Receipt, duplicate| Accepted {
        seq: receipt.seq.0,
        delivery_proof: app.signer.prove(recipient, receipt).encode_to_vec().into(),
        duplicate,
    };
    match outcome {
        Enqueued::Accepted(receipt) => Ok(of(&receipt, false)),
        Enqueued::Duplicate(receipt) => Ok(of(&receipt, true)),
        Enqueued::NoSuchRecipient => Err(Error::NoSuchRecipient),
        Enqueued::QueueFull => Err(Error::QueueFull),
        Enqueued::SenderShare => Err(Error::SenderShare),
    }
}
