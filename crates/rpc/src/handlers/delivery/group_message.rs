//! One message to a group: a commit, or a message to all members.

use std::collections::HashSet;

use bytes::Bytes;
use qpq_domain::{IdentityKey, MAX_BATCH, MAX_GROUP_INFO};
use qpq_ports::{Commit, GroupMessage, GroupRecipients, GroupSent};
use qpq_proto::{LimitClass, Status, convert, v1};
use sha2::{Digest as _, Sha256};

use super::{
    batch_enqueue::{batch_result, refused},
    message::{accepted, charge},
    page,
};
use crate::{App, Caller, Cx, Error, Subject};

/// The code of an accepted message that some members did not receive.
const PARTIAL: &str = "delivery.partial";

/// Returns whether a BatchEnqueue is for a group. Such a batch has one payload and is accepted or
/// refused as a whole.
pub(super) fn is_for_group(request: &v1::BatchEnqueueRequest) -> bool {
    request.commit
        || request.to_members
        || request.expected_epoch != 0
        || !request.group_info.is_empty()
}

/// Sends a message to a group.
pub(super) async fn send(
    cx: Cx<'_>,
    caller: Caller,
    request: v1::BatchEnqueueRequest,
) -> Result<v1::BatchEnqueueResponse, Error> {
    let message = parse(cx, &caller, request)?;
    let listed = match &message.recipients {
        GroupRecipients::Listed(recipients) => recipients.clone(),
        GroupRecipients::Others | GroupRecipients::All => Vec::new(),
    };
    if listed.is_empty() {
        charge_payload(cx, &caller, message.payload.len()).await?;
    } else {
        let bytes = message.payload.len().saturating_mul(listed.len()) as u64;
        charge(cx, caller.account, listed.len(), bytes).await?;
    }
    let sent = cx.app.stores.groups.send(message).await??;
    if !listed.is_empty() {
        return Ok(of_listed(cx.app, &listed, sent).await);
    }
    charge_members(cx, &caller, sent.recipients);
    let code = if sent.skipped > 0 { PARTIAL } else { "" };
    let result = v1::BatchResult {
        status: Status::Ok.code().into(),
        code: code.into(),
        duplicate: sent.is_repeat,
        ..v1::BatchResult::default()
    };
    Ok(v1::BatchEnqueueResponse { seqs: Vec::new(), results: vec![result], epoch: sent.epoch })
}

/// Takes the payload of a message to all members from the sender's budgets. The payload counts
/// once, because it is stored once. [`charge_members`] takes the inboxes when their number is
/// known.
pub(in crate::handlers) async fn charge_payload(
    cx: Cx<'_>,
    caller: &Caller,
    bytes: usize,
) -> Result<(), Error> {
    charge(cx, caller.account, 1, bytes as u64).await
}

/// Adds the inboxes of a message to all members to the debt that the sender's next call pays,
/// except for the one inbox that was taken with the call.
pub(in crate::handlers) fn charge_members(cx: Cx<'_>, caller: &Caller, recipients: u32) {
    let subject = Subject::Account(caller.account).key();
    cx.app.debts.add(LimitClass::Send, subject, recipients.saturating_sub(1), cx.now);
}

/// Checks the fields of a message to a group.
fn parse(
    cx: Cx<'_>,
    caller: &Caller,
    request: v1::BatchEnqueueRequest,
) -> Result<GroupMessage, Error> {
    let limits = &cx.app.config.delivery;
    let needs_commit = request.expected_epoch != 0 || !request.group_info.is_empty();
    if !request.messages.is_empty() || (needs_commit && !request.commit) {
        return Err(Error::InvalidBatch);
    }
    convert::no_longer_than(&request.group_info, MAX_GROUP_INFO, "group_info")?;
    let recipients = recipients(&request, limits.max_batch_bytes)?;
    let group = convert::group_id(&request.channel_id, "channel_id")?;
    let message_id = convert::message_id(&request.message_id, "message_id")?;
    if request.payload.len() > limits.max_payload.min(page::MAX_PAYLOAD) {
        return Err(Error::PayloadTooLarge);
    }
    let some = |bytes: Bytes| (!bytes.is_empty()).then_some(bytes);
    Ok(GroupMessage {
        group,
        sender: caller.account,
        sender_key: caller.identity,
        sender_device: caller.device,
        recipients,
        payload_sha256: Sha256::digest(&request.payload).into(),
        payload: request.payload,
        message_id,
        ttl: limits.ttl(request.ttl_secs),
        now: cx.now,
        commit: request.commit.then(|| Commit {
            expected_epoch: request.expected_epoch,
            group_info: some(request.group_info),
        }),
    })
}

/// Returns the recipients: all members, or the listed ones. Refuses a repeated one.
fn recipients(
    request: &v1::BatchEnqueueRequest,
    max_batch_bytes: u64,
) -> Result<GroupRecipients, Error> {
    let count = request.recipient_keys.len();
    match (request.to_members, count) {
        (true, 0) => return Ok(GroupRecipients::Others),
        (false, 1..=MAX_BATCH) => {}
        _ => return Err(Error::InvalidBatch),
    }
    if request.payload.len().saturating_mul(count) as u64 > max_batch_bytes {
        return Err(Error::BatchTooLarge);
    }
    let listed = convert::identity_keys(&request.recipient_keys, "recipient_keys")?;
    if listed.iter().collect::<HashSet<_>>().len() < count {
        return Err(Error::InvalidBatch);
    }
    Ok(GroupRecipients::Listed(listed))
}

/// Returns one result for each listed recipient.
async fn of_listed(
    app: &App,
    recipients: &[IdentityKey],
    sent: GroupSent,
) -> v1::BatchEnqueueResponse {
    let mut results = Vec::with_capacity(recipients.len());
    for (recipient, outcome) in recipients.iter().zip(sent.outcomes) {
        results.push(match accepted(app, recipient, outcome) {
            Ok(accepted) => batch_result(accepted),
            Err(error) => refused(error.code()),
        });
        if results.len() % super::batch_enqueue::STRIDE == 0 {
            tokio::task::yield_now().await;
        }
    }
    let seqs = results.iter().map(|result| result.seq).collect();
    v1::BatchEnqueueResponse { seqs, results, epoch: sent.epoch }
}
