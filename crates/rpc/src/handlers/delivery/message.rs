//! The steps that Enqueue and BatchEnqueue share.
//!
//! A payload may be empty; the server does not interpret it. The delivery proof is signed after the
//! commit, from the receipt that the store keeps. So a repeated request receives the seq and the
//! proof of the first one.

use bytes::Bytes;
use prost::Message as _;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use qpq_ports::{Enqueued, NewMessage, Receipt};
use qpq_proto::{LimitClass, convert, v1};
use sha2::{Digest as _, Sha256};

use super::page;
use crate::{App, Cx, Error, Subject};

/// The size in bytes from which a call consumes the budget of bytes. The budget of messages
/// suffices for smaller calls and saves them a second look-up.
const COUNTED_BYTES: u64 = 16 << 10;

/// Takes `messages` and `bytes` from the sender's budgets, except for the one message that was
/// taken with the call.
pub(super) async fn charge(
    cx: Cx<'_>,
    sender: AccountId,
    messages: usize,
    bytes: u64,
) -> Result<(), Error> {
    let sender = Subject::Account(sender);
    let more = u32::try_from(messages.saturating_sub(1)).unwrap_or(u32::MAX);
    cx.charge(LimitClass::Send, sender, more).await?;
    if bytes < COUNTED_BYTES {
        return Ok(());
    }
    cx.charge(LimitClass::SendBytes, sender, u32::try_from(bytes).unwrap_or(u32::MAX)).await
}

/// Parses a message of `sender` into the form that the store accepts.
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

/// The response fields of an accepted message.
pub(super) struct Accepted {
    pub(super) seq: u64,
    pub(super) delivery_proof: Bytes,
    pub(super) duplicate: bool,
}

/// Converts the store's outcome to the response, and signs the delivery proof.
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
        Enqueued::Refused => Err(Error::DeliveryRefused),
        Enqueued::QueueFull => Err(Error::QueueFull),
        Enqueued::SenderShare => Err(Error::SenderShare),
    }
}
