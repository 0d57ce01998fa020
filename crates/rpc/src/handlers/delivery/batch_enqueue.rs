//! BatchEnqueue (205): sends one payload to many recipients, or a list of messages. A commit and a
//! message to all members are in `group_message`.
//!
//! A batch is stored in several calls of bounded size, so that no transaction is large and other
//! calls are executed in between. Each message has its own result. If the store fails, the messages
//! of earlier calls are accepted, and all others have the store's error as their result. Nothing is
//! retried here, because a message without an id would be accepted twice.

use std::collections::HashSet;

use bytes::Bytes;
use qpq_domain::{IdentityKey, MAX_BATCH, UnixMillis};
use qpq_ports::{Batch, CALL_BYTES, CALL_MESSAGES, Enqueued, Inboxes, NewMessage};
use qpq_proto::{convert, methods, v1};

use super::{
    group_message,
    message::{Accepted, accepted, charge, parse},
};
use crate::{App, Caller, Cx, Error, Handled, Handler, error::Code};

/// The number of signatures or digests after which a call yields to others on its worker. That work
/// takes about a millisecond.
pub(super) const STRIDE: usize = 32;

/// The maximum size of one result in bytes: a proof of about 230 bytes, a seq, a code.
const RESULT_BYTES: usize = 512;

impl Handler for methods::BatchEnqueue {
    fn answer_bytes(request: &v1::BatchEnqueueRequest) -> usize {
        request.messages.len().max(request.recipient_keys.len()).min(MAX_BATCH) * RESULT_BYTES
    }

    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::BatchEnqueueRequest) -> Handled<Self> {
        if group_message::is_for_group(&request) {
            return Ok(group_message::send(cx, caller, request).await?.into());
        }
        let Size { messages, bytes } = size(cx.app, &request)?;
        charge(cx, caller.account, messages, bytes).await?;
        let parsed = parse_batch(cx.app, &caller.identity, request, cx.now).await?;
        // A refused message keeps its index among the results; the store does not receive it.
        let mut messages = Vec::with_capacity(parsed.len());
        let mut places = Vec::with_capacity(parsed.len());
        for item in parsed {
            places.push(item.map(|message| {
                let recipient = message.recipient;
                messages.push(message);
                recipient
            }));
        }
        let stored = store(&*cx.app.stores.inboxes, messages).await?;
        let results = results(cx.app, places, stored).await;
        Ok(v1::BatchEnqueueResponse {
            seqs: results.iter().map(|r| r.seq).collect(),
            results,
            epoch: 0,
        }
        .into())
    }
}

/// The size of a batch for limits and budgets.
struct Size {
    messages: usize,
    /// The size of the payload times the number of recipients, or the sum of the payloads' sizes.
    bytes: u64,
}

/// Checks the form and the size of a batch before its messages are parsed.
fn size(app: &App, request: &v1::BatchEnqueueRequest) -> Result<Size, Error> {
    let is_list = !request.messages.is_empty();
    let is_fan_out = !request.recipient_keys.is_empty();
    let has_shared = !(request.payload.is_empty()
        && request.channel_id.is_empty()
        && request.message_id.is_empty()
        && request.ttl_secs == 0);
    if is_list == is_fan_out || (is_list && has_shared) {
        return Err(Error::InvalidBatch);
    }
    let messages = request.messages.len().max(request.recipient_keys.len());
    if messages > MAX_BATCH {
        return Err(Error::InvalidBatch);
    }
    let recipients: HashSet<_> = request.recipient_keys.iter().collect();
    if recipients.len() < request.recipient_keys.len() {
        return Err(Error::InvalidBatch);
    }
    let listed: usize = request.messages.iter().map(|message| message.payload.len()).sum();
    let fanned_out = request.payload.len().saturating_mul(request.recipient_keys.len());
    let bytes = listed.max(fanned_out) as u64;
    if bytes > app.config.delivery.max_batch_bytes {
        return Err(Error::BatchTooLarge);
    }
    Ok(Size { messages, bytes })
}

/// Parses the messages of either form of a batch, each with its own outcome. In a fan-out, all
/// fields but the recipient are shared, and an invalid one fails the whole batch.
async fn parse_batch(
    app: &App,
    sender: &IdentityKey,
    request: v1::BatchEnqueueRequest,
    now: UnixMillis,
) -> Result<Vec<Result<NewMessage, Error>>, Error> {
    if request.messages.is_empty() {
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
) -> Result<Vec<Result<NewMessage, Error>>, Error> {
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
        Ok(NewMessage { recipient, ..shared.clone() })
    };
    Ok(request.recipient_keys.iter().map(to).collect())
}

async fn list(
    app: &App,
    sender: &IdentityKey,
    messages: &[v1::EnqueueRequest],
    now: UnixMillis,
) -> Result<Vec<Result<NewMessage, Error>>, Error> {
    let mut parsed = Vec::with_capacity(messages.len());
    for some in messages.chunks(STRIDE) {
        parsed.extend(some.iter().map(|message| parse(app, sender, message, now)));
        tokio::task::yield_now().await;
    }
    Ok(parsed)
}

/// The store's outcome of a batch.
struct Stored {
    /// The outcomes of the first messages, in their order.
    outcomes: Vec<Enqueued>,
    /// The reason why the others were not accepted.
    failed: Option<Error>,
}

/// Stores the messages in calls of bounded size. Fails if none was accepted.
async fn store(inboxes: &dyn Inboxes, mut messages: Vec<NewMessage>) -> Result<Stored, Error> {
    let mut outcomes = Vec::with_capacity(messages.len());
    while !messages.is_empty() {
        let rest = messages.split_off(one_call(&messages));
        let batch = Batch::new(std::mem::replace(&mut messages, rest));
        match inboxes.enqueue(batch).await {
            Ok(of_these) => outcomes.extend(of_these),
            Err(error) if outcomes.is_empty() => return Err(error.into()),
            Err(error) => return Ok(Stored { outcomes, failed: Some(error.into()) }),
        }
    }
    Ok(Stored { outcomes, failed: None })
}

/// Returns the number of messages for the next call of the store, at least one.
fn one_call(messages: &[NewMessage]) -> usize {
    let mut bytes = 0;
    let fit = messages.iter().take(CALL_MESSAGES).take_while(|message| {
        bytes += message.payload.len();
        bytes <= CALL_BYTES
    });
    fit.count().max(1)
}

/// Returns one result for each place. `stored` has the outcomes of the places that are `Ok`.
async fn results(
    app: &App,
    places: Vec<Result<IdentityKey, Error>>,
    stored: Stored,
) -> Vec<v1::BatchResult> {
    let failed = stored.failed.as_ref().map(Error::code);
    let mut outcomes = stored.outcomes.into_iter();
    let mut results = Vec::with_capacity(places.len());
    for place in places {
        results.push(match (place, failed) {
            (Err(error), _) => refused(error.code()),
            (Ok(recipient), failed) => match (outcomes.next(), failed) {
                (Some(outcome), _) => match accepted(app, &recipient, outcome) {
                    Ok(accepted) => batch_result(accepted),
                    Err(error) => refused(error.code()),
                },
                (None, Some(code)) => refused(code),
                (None, None) => refused(Code::Internal),
            },
        });
        if results.len() % STRIDE == 0 {
            tokio::task::yield_now().await;
        }
    }
    results
}

pub(super) fn batch_result(
    Accepted { seq, delivery_proof, duplicate }: Accepted,
) -> v1::BatchResult {
    v1::BatchResult { seq, delivery_proof, duplicate, ..v1::BatchResult::default() }
}

pub(super) fn refused(code: Code) -> v1::BatchResult {
    v1::BatchResult {
        status: code.status().code().into(),
        code: code.as_str().into(),
        ..v1::BatchResult::default()
    }
}
