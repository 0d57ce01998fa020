//! Sending: one message (200) or many in one commit (205).
//!
//! A payload may be empty: the server does not look into it. The proof is signed when the store has
//! committed, never before, from what the store kept; so a repeated request is answered with the
//! first one's seq and proof.

use bytes::Bytes;
use prost::Message as _;
use qpq_domain::{IdentityKey, MAX_BATCH, UnixMillis};
use qpq_ports::{Enqueue, Enqueued, Receipt};
use qpq_proto::{convert, methods, v1};
use sha2::{Digest as _, Sha256};

use super::page;
use crate::{Answered, App, Caller, Cx, Error, Handler};

/// Signatures and digests between two chances for others on this worker: about a millisecond.
const STRIDE: usize = 32;

impl Handler for methods::Enqueue {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::EnqueueRequest,
    ) -> Result<Answered<v1::EnqueueResponse>, Error> {
        let message = parse(cx.app, &caller.identity, &request, cx.now)?;
        let recipient = message.recipient;
        drop(request);
        let outcome = cx.app.stores.inboxes.enqueue(vec![message]).await?.into_iter().next();
        let outcome = outcome.ok_or_else(|| Error::internal("the store answered no outcome"))?;
        let Accepted { seq, delivery_proof, duplicate } = accepted(cx.app, &recipient, outcome)?;
        Ok(v1::EnqueueResponse { seq, delivery_proof, duplicate }.into())
    }
}

/// One result of a batch at most: a proof of about 230 bytes, a seq, a code.
const RESULT_BYTES: usize = 512;

impl Handler for methods::BatchEnqueue {
    fn answer_bytes(request: &v1::BatchEnqueueRequest) -> usize {
        request.messages.len().max(request.recipient_keys.len()).min(MAX_BATCH) * RESULT_BYTES
    }

    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::BatchEnqueueRequest,
    ) -> Result<Answered<v1::BatchEnqueueResponse>, Error> {
        let parsed = parse_batch(cx.app, &caller.identity, request, cx.now).await?;
        // What was refused keeps its place among the results and never reaches the store.
        let mut messages = Vec::with_capacity(parsed.len());
        let mut places = Vec::with_capacity(parsed.len());
        for item in parsed {
            places.push(item.map(|message| {
                let recipient = message.recipient;
                messages.push(message);
                recipient
            }));
        }
        let outcomes = if messages.is_empty() {
            Vec::new()
        } else {
            cx.app.stores.inboxes.enqueue(messages).await?
        };
        let results = results(cx.app, places, outcomes).await;
        Ok(v1::BatchEnqueueResponse {
            seqs: results.iter().map(|r| r.seq).collect(),
            results,
            epoch: 0,
        }
        .into())
    }
}

/// A message of `sender` as the store takes it.
fn parse(
    app: &App,
    sender: &IdentityKey,
    request: &v1::EnqueueRequest,
    now: UnixMillis,
) -> Result<Enqueue, Error> {
    let recipient = convert::identity_key(&request.recipient_key, "recipient_key")?;
    let channel = convert::channel_id(&request.channel_id, "channel_id")?;
    let message_id = convert::message_id(&request.message_id, "message_id")?;
    let limits = &app.config.delivery;
    if request.payload.len() > limits.max_payload.min(page::MAX_PAYLOAD) {
        return Err(Error::PayloadTooLarge);
    }
    Ok(Enqueue {
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

/// The messages of either form of a batch, each good or refused for itself. What all share (the
/// form, and in a fan-out everything but the recipient) fails the whole.
async fn parse_batch(
    app: &App,
    sender: &IdentityKey,
    request: v1::BatchEnqueueRequest,
    now: UnixMillis,
) -> Result<Vec<Result<Enqueue, Error>>, Error> {
    if request.commit || request.expected_epoch != 0 {
        return Err(Error::CommitUnsupported);
    }
    let is_list = !request.messages.is_empty();
    let is_fan_out = !request.recipient_keys.is_empty();
    let has_shared = !(request.payload.is_empty()
        && request.channel_id.is_empty()
        && request.message_id.is_empty()
        && request.ttl_secs == 0);
    if is_list == is_fan_out || (is_list && has_shared) {
        return Err(Error::InvalidBatch);
    }
    if request.messages.len().max(request.recipient_keys.len()) > MAX_BATCH {
        return Err(Error::InvalidBatch);
    }
    if is_fan_out {
        fan_out(app, sender, &request, now)
    } else {
        list(app, sender, &request.messages, now).await
    }
}

fn fan_out(
    app: &App,
    sender: &IdentityKey,
    request: &v1::BatchEnqueueRequest,
    now: UnixMillis,
) -> Result<Vec<Result<Enqueue, Error>>, Error> {
    let shared = v1::EnqueueRequest {
        recipient_key: Bytes::copy_from_slice(sender.as_bytes()),
        payload: request.payload.clone(),
        channel_id: request.channel_id.clone(),
        ttl_secs: request.ttl_secs,
        message_id: request.message_id.clone(),
        session_token: Bytes::new(),
    };
    let shared = parse(app, sender, &shared, now)?;
    let to = |key: &Bytes| {
        let recipient = convert::identity_key(key, "recipient_keys")?;
        Ok(Enqueue { recipient, ..shared.clone() })
    };
    Ok(request.recipient_keys.iter().map(to).collect())
}

async fn list(
    app: &App,
    sender: &IdentityKey,
    messages: &[v1::EnqueueRequest],
    now: UnixMillis,
) -> Result<Vec<Result<Enqueue, Error>>, Error> {
    let mut parsed = Vec::with_capacity(messages.len());
    for some in messages.chunks(STRIDE) {
        parsed.extend(some.iter().map(|message| parse(app, sender, message, now)));
        tokio::task::yield_now().await;
    }
    Ok(parsed)
}

/// What the sender of an accepted message gets.
struct Accepted {
    seq: u64,
    delivery_proof: Bytes,
    duplicate: bool,
}

fn accepted(app: &App, recipient: &IdentityKey, outcome: Enqueued) -> Result<Accepted, Error> {
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
    }
}

/// One result for each place; `outcomes` are those of the places that are `Ok`, in their order.
async fn results(
    app: &App,
    places: Vec<Result<IdentityKey, Error>>,
    outcomes: Vec<Enqueued>,
) -> Vec<v1::BatchResult> {
    let mut outcomes = outcomes.into_iter();
    let mut results = Vec::with_capacity(places.len());
    for place in places {
        let result = place.and_then(|recipient| {
            let outcome = outcomes
                .next()
                .ok_or_else(|| Error::internal("the store answered too few outcomes"))?;
            accepted(app, &recipient, outcome)
        });
        results.push(batch_result(result));
        if results.len() % STRIDE == 0 {
            tokio::task::yield_now().await;
        }
    }
    results
}

fn batch_result(result: Result<Accepted, Error>) -> v1::BatchResult {
    match result {
        Ok(Accepted { seq, delivery_proof, duplicate }) => {
            v1::BatchResult { seq, delivery_proof, duplicate, ..v1::BatchResult::default() }
        }
        Err(error) => {
            let code = error.code();
            v1::BatchResult {
                status: code.status().code().into(),
                code: code.as_str().into(),
                ..v1::BatchResult::default()
            }
        }
    }
}
