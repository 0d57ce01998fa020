//! The calls that send an item of the outbox, and a marker before it, to the server.

use qpq_domain::IdentityKey;
use qpq_proto::{Status, methods, v1};

use super::{
    Messenger,
    marker::{MARKER_TTL_SECS, Marker},
    now,
    outbox::{Outgoing, RecipientStatus, fresh_message_id},
};
use crate::error::{CallError, Error};

impl Messenger {
    /// Sends a marker to the account's own inbox, if one is due.
    pub(super) async fn send_due_marker(&self) -> Result<(), CallError> {
        let due = self.store().read(|state| Ok((state.due_marker()?, state.is_unverified()?)));
        let Ok((Some(marker), is_unverified)) = due.await else { return Ok(()) };
        if is_unverified && let Err(error) = self.end_unverified().await {
            tracing::warn!(%error, "a marker is not sent");
            return Ok(());
        }
        match self.client().call::<methods::Enqueue>(to_self(&marker)).await {
            Ok(_) => {
                let generation = marker.generation;
                let noted = self.store().change(move |state| Ok(state.set_marked(generation)?));
                if let Err(error) = noted.await {
                    tracing::warn!(%error, "a marker was sent and not noted");
                }
                Ok(())
            }
            Err(error) if error.server().is_some() && !error.is_unauthorized() => {
                tracing::info!(%error, "the server does not accept a marker now");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Ends the note of another process that messages were encrypted before the inbox was read.
    ///
    /// This process has compared the same state. Without this, a later process would take the next
    /// marker for one of a newer state.
    pub(super) async fn end_unverified(&self) -> Result<(), Error> {
        self.store().change(|state| Ok(state.end_unverified()?)).await
    }

    /// Sends the marker, if one is due, and then the item. Both are sent in one call if possible.
    pub(super) async fn enqueue_marked(
        &self,
        item: &Outgoing,
        recipients: &[IdentityKey],
        due: Option<&Marker>,
        marked: &mut u64,
    ) -> Result<Vec<(IdentityKey, RecipientStatus)>, CallError> {
        let Some(marker) = due else { return self.enqueue(item, recipients).await };
        let to_self = to_self(marker);
        let [recipient] = recipients else {
            match self.client().call::<methods::Enqueue>(to_self).await {
                Ok(_) => *marked = marker.generation,
                Err(error) if error.server().is_some() && !error.is_unauthorized() => {
                    tracing::info!(%error, "the server does not accept a marker now");
                }
                Err(error) => return Err(error),
            }
            return self.enqueue(item, recipients).await;
        };
        let message = v1::EnqueueRequest {
            recipient_key: recipient.as_bytes().to_vec().into(),
            payload: item.payload.clone().into(),
            channel_id: item.channel.as_bytes().to_vec().into(),
            message_id: item.message_id.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let request =
            v1::BatchEnqueueRequest { messages: vec![to_self, message], ..Default::default() };
        let status = match self.client().call::<methods::BatchEnqueue>(request).await {
            Ok(answer) => match &answer.results[..] {
                [of_marker, of_item] => {
                    if recipient_status(of_marker.status, &of_marker.code)
                        == RecipientStatus::Accepted
                    {
                        *marked = marker.generation;
                    }
                    recipient_status(of_item.status, &of_item.code)
                }
                _ => return Err(CallError::Malformed { method: "BatchEnqueue" }),
            },
            Err(error) => status_of_all(error)?,
        };
        Ok(vec![(*recipient, status)])
    }

    async fn enqueue(
        &self,
        item: &Outgoing,
        recipients: &[IdentityKey],
    ) -> Result<Vec<(IdentityKey, RecipientStatus)>, CallError> {
        let request = v1::BatchEnqueueRequest {
            recipient_keys: recipients.iter().map(|key| key.as_bytes().to_vec().into()).collect(),
            payload: item.payload.clone().into(),
            channel_id: item.channel.as_bytes().to_vec().into(),
            message_id: item.message_id.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let results = match self.client().call::<methods::BatchEnqueue>(request).await {
            Ok(answer) if answer.results.len() == recipients.len() => answer
                .results
                .into_iter()
                .map(|result| recipient_status(result.status, &result.code))
                .collect(),
            Ok(_) => return Err(CallError::Malformed { method: "BatchEnqueue" }),
            Err(error) => vec![status_of_all(error)?; recipients.len()],
        };
        Ok(recipients.iter().copied().zip(results).collect())
    }
}

/// Returns the request that puts a marker into the account's own inbox.
fn to_self(marker: &Marker) -> v1::EnqueueRequest {
    v1::EnqueueRequest {
        recipient_key: marker.owner.as_bytes().to_vec().into(),
        payload: marker.payload.clone().into(),
        channel_id: marker.channel.as_bytes().to_vec().into(),
        message_id: fresh_message_id(now()).as_bytes().to_vec().into(),
        ttl_secs: MARKER_TTL_SECS,
        ..Default::default()
    }
}

pub(super) fn recipient_status(status: u32, code: &str) -> RecipientStatus {
    let status = u8::try_from(status).map_or(Status::Internal, Status::from);
    match status {
        Status::Ok => RecipientStatus::Accepted,
        status if status.is_temporary() || status == Status::Unauthorized => RecipientStatus::Later,
        status if code.is_empty() => RecipientStatus::Refused(status.name().to_owned()),
        _ => RecipientStatus::Refused(code.to_owned()),
    }
}

/// Returns the answer for each recipient after a refusal of the whole call. The error is returned
/// if it is not about the message.
fn status_of_all(error: CallError) -> Result<RecipientStatus, CallError> {
    match &error {
        CallError::TooLarge { .. } => Ok(RecipientStatus::Refused(error.to_string())),
        CallError::Server(refusal) => match refusal.status {
            Status::BadRequest | Status::Forbidden | Status::NotFound => {
                Ok(RecipientStatus::Refused(refusal.to_string()))
            }
            _ => Err(error),
        },
        _ => Err(error),
    }
}
