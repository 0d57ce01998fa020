//! Sending: encrypts, saves the ciphertext together with the state, then sends the outbox.

use std::{collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use qpq_domain::{IdentityKey, MAX_BATCH, UnixMillis, Username};
use qpq_mls::{Change, Content, GroupId, SharedFile};
use tokio::time::Instant;

use super::{
    Messenger,
    log::{ConversationId, DeliveryState, EntryId, Event},
    marker::Marker,
    now,
    outbox::{OutboxPosition, Outgoing, RecipientStatus, fresh_message_id},
    people::Person,
    state::State,
};
use crate::{
    error::{CallError, Error},
    link::ConnectionEvent,
    profile::{self, Task},
};

/// The maximum length of a message, in bytes of UTF-8.
pub const MAX_TEXT: usize = 64 * 1024;

/// The number of messages that are sent before the server's answers to them are saved. After a
/// crash, a message without a saved answer is sent again under its message id, which the server
/// recognizes.
const SEND_BATCH: usize = 16;
/// Maximum time until the answers are saved, unless one message takes longer: a server may accept
/// only a few bytes at a time.
const SAVED_WITHIN: Duration = Duration::from_secs(1);

/// A message that is saved and sent, or will be sent.
#[derive(Debug)]
pub struct Sent {
    /// The entry of the message in the history.
    pub entry: EntryId,
    /// The result of sending.
    pub outcome: SendOutcome,
}

/// The state of a message when [`Messenger::send`] returned.
#[derive(Debug)]
pub enum SendOutcome {
    /// The server has stored the message for all recipients.
    Sent,
    /// The message is saved here, and the next operation that sends will send it. The server cannot
    /// be reached (`Some`), or a recipient's inbox has no room now (`None`).
    Queued(Option<CallError>),
    /// The server refuses the message for a recipient, which an [`Event::Undeliverable`] names.
    Refused,
}

impl Messenger {
    /// Returns the conversation with an account. Nothing is sent; the first message starts it.
    pub async fn conversation_with(&self, username: &Username) -> Result<ConversationId, Error> {
        let person = self.resolve(username).await?;
        if person.identity == self.profile().identity {
            return Err(qpq_mls::Error::Yourself.into());
        }
        Ok(ConversationId::Direct(person.identity))
    }

    /// Sends a text of at most [`MAX_TEXT`] bytes to everyone in a conversation. When this function
    /// returns, the message is saved. If it could not be sent now, it is sent later.
    pub async fn send(&self, conversation: ConversationId, text: &str) -> Result<Sent, Error> {
        let entry = self.queue(conversation, text).await?;
        let outcome = self.outcome(self.flush().await, Some(entry)).await?;
        Ok(Sent { entry, outcome })
    }

    /// Saves a text for sending, without waiting for the server. [`Messenger::flush`] sends the
    /// text. Only the first message of a conversation causes calls to the server.
    pub async fn queue(&self, conversation: ConversationId, text: &str) -> Result<EntryId, Error> {
        let entries = self.queue_all(conversation, vec![text.to_owned()]).await?;
        Ok(entries[0])
    }

    /// Saves texts as [`Messenger::queue`] does, all or none, and returns their entries.
    pub async fn queue_all(
        &self,
        conversation: ConversationId,
        texts: Vec<String>,
    ) -> Result<Vec<EntryId>, Error> {
        if let Some(text) = texts.iter().find(|text| text.len() > MAX_TEXT) {
            return Err(Error::TextTooLong { size: text.len(), max: MAX_TEXT });
        }
        self.prepare_to_send(conversation).await?;
        self.store()
            .change(move |state| {
                if let ConversationId::Direct(peer) = conversation {
                    state.note_contact(&peer)?;
                }
                texts.into_iter().map(|text| encrypt(state, conversation, text, None)).collect()
            })
            .await
    }

    /// Sends a message about an uploaded file, as [`Messenger::send`] does. In the same step, the
    /// state of the upload is forgotten.
    pub(super) async fn send_uploaded(
        &self,
        conversation: ConversationId,
        file: SharedFile,
        content: [u8; 32],
    ) -> Result<Sent, Error> {
        let entry = self
            .store()
            .change(move |state| {
                if let ConversationId::Direct(peer) = conversation {
                    state.note_contact(&peer)?;
                }
                state.forget_upload(&content)?;
                encrypt(state, conversation, String::new(), Some(file))
            })
            .await?;
        let outcome = self.outcome(self.flush().await, Some(entry)).await?;
        Ok(Sent { entry, outcome })
    }

    /// Makes a conversation ready for messages: the first one needs a group.
    pub(super) async fn prepare_to_send(&self, conversation: ConversationId) -> Result<(), Error> {
        if let ConversationId::Direct(peer) = conversation {
            self.store().read(move |state| state.check_not_blocked(&peer)).await?;
        }
        self.verify().await?;
        if let ConversationId::Direct(peer) = conversation {
            self.start_direct(peer).await?;
        }
        self.update_devices(conversation).await
    }

    /// Returns the delivery state of a message of ours; `None` if there is no such entry.
    pub async fn delivery(&self, entry: EntryId) -> Result<Option<DeliveryState>, Error> {
        self.store().read(move |state| Ok(state.log.delivery(entry)?)).await
    }

    /// Runs the pending changes of groups, and sends the outbox, oldest first.
    ///
    /// Messages that the server has no room for now stay in the outbox.
    pub async fn flush(&self) -> Result<(), Error> {
        self.run_changes(None).await?;
        self.flush_outbox().await
    }

    pub(super) async fn flush_outbox(&self) -> Result<(), Error> {
        let end = self.store().read(|state| Ok(state.outbox.end()?)).await?;
        self.send_until(end).await
    }

    /// Checks that this state is not an older copy of the profile, before anything is encrypted.
    ///
    /// If the server cannot be asked now, the check is done later.
    pub(super) async fn verify(&self) -> Result<(), Error> {
        if self.shared.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        let is_connected = matches!(
            *self.client().connection_events().borrow(),
            ConnectionEvent::Connected { .. }
        );
        if is_connected && let Ok(keys) = self.sync().await {
            // A lost connection does not keep a message from being queued.
            if let Err(error) = Box::pin(self.settle_keys(keys)).await {
                tracing::warn!(%error, "key packages were not published");
            }
            // Unless another process is reading.
            if self.shared.verified.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        self.store().change(|state| Ok(state.begin_unverified()?)).await
    }

    /// Sends the outbox as [`Messenger::flush`] does, up to this message of ours.
    pub async fn flush_until(&self, entry: EntryId) -> Result<(), Error> {
        match self.store().read(move |state| Ok(state.outbox.end_of(entry)?)).await? {
            Some(end) => self.send_until(end).await,
            None => Ok(()),
        }
    }

    async fn send_until(&self, mut end: OutboxPosition) -> Result<(), Error> {
        if self.store().read(|state| Ok(state.outbox.is_empty()?)).await? {
            return Ok(());
        }
        if !self.shared.verified.load(Ordering::Relaxed) {
            let before = self.store().read(|state| Ok(state.outbox.end()?)).await?;
            match Box::pin(self.sync_to_end()).await {
                Ok(keys) => Box::pin(self.settle_keys(keys)).await?,
                // Another process is reading. The messages wait until one has read to the end.
                Err(Error::GroupBusy) => return Ok(()),
                Err(error) => return Err(error),
            }
            // Messages that were encrypted again have new positions.
            let after = self.store().read(|state| Ok(state.outbox.end()?)).await?;
            end = if after > before { after } else { end };
        }
        let mut backlog = Backlog { from: None, end, stopped: BTreeSet::new() };
        while self.send_some(&mut backlog).await? == Unsent::Some {}
        Ok(())
    }

    /// Returns whether the outbox has messages, or a change is pending.
    pub(super) async fn has_unsent(&self) -> Result<bool, Error> {
        self.store().read(|state| Ok(!state.outbox.is_empty()? || state.has_changes()?)).await
    }

    /// Sends the first items of a backlog, and saves the answers.
    ///
    /// Sends so few items that other tasks can wait for it. Several tasks and processes may send
    /// concurrently: each begins with the oldest item that is left.
    async fn send_some(&self, backlog: &mut Backlog) -> Result<Unsent, Error> {
        let _alone = self.shared.flushing.lock().await;
        let patience = self.client().options().patience;
        let turn = profile::turn(self.store().dir(), Task::SendOutbox, patience).await?;
        // Another process is sending the outbox, which includes our messages.
        let Some(_turn) = turn else { return Ok(Unsent::Nothing) };
        let (mut answers, mut sent, mut marked) = (Vec::new(), Ok(()), 0);
        let mut left = Unsent::Some;
        let until = Instant::now() + SAVED_WITHIN;
        while sent.is_ok() && answers.len() < SEND_BATCH && Instant::now() < until {
            let (from, end) = (backlog.from, backlog.end);
            let next = self.store().read(move |state| {
                let Some((place, item)) = state.outbox.next(from, end)? else { return Ok(None) };
                Ok(Some((place, item, state.due_marker()?, state.is_unverified()?)))
            });
            let Some((place, item, marker, is_unverified)) = next.await? else {
                left = Unsent::Nothing;
                break;
            };
            if is_unverified {
                self.end_unverified().await?;
            }
            backlog.from = Some(place);
            let marker = marker.as_ref().filter(|marker| marker.generation > marked);
            let (statuses, outcome) =
                self.send_item(&item, marker, &mut marked, &mut backlog.stopped).await;
            if !statuses.is_empty() {
                answers.push((place, statuses));
            }
            sent = outcome;
        }
        if !answers.is_empty() || marked > 0 {
            self.store()
                .change(move |state| {
                    state.set_marked(marked)?;
                    answers.iter().try_for_each(|(place, statuses)| settle(state, *place, statuses))
                })
                .await?;
        }
        sent?;
        Ok(left)
    }

    /// Sends one item to all recipients that are not in `stopped`. Returns the answers before the
    /// failure, if there was one.
    async fn send_item(
        &self,
        item: &Outgoing,
        marker: Option<&Marker>,
        marked: &mut u64,
        stopped: &mut BTreeSet<IdentityKey>,
    ) -> (Vec<(IdentityKey, RecipientStatus)>, Result<(), CallError>) {
        let recipients = item.recipients.iter().filter(|key| !stopped.contains(*key));
        let recipients: Vec<_> = recipients.copied().collect();
        let mut statuses = Vec::with_capacity(recipients.len());
        for some in recipients.chunks(MAX_BATCH) {
            let due = marker.filter(|marker| marker.generation > *marked);
            match self.enqueue_marked(item, some, due, marked).await {
                Ok(answers) => statuses.extend(answers),
                Err(error) => return (statuses, Err(error)),
            }
        }
        let later = statuses.iter().filter(|(_, status)| *status == RecipientStatus::Later);
        stopped.extend(later.map(|(recipient, _)| *recipient));
        (statuses, Ok(()))
    }

    /// Creates a direct group with `peer`, unless there is one to send to.
    async fn start_direct(&self, peer: IdentityKey) -> Result<(), Error> {
        if self.store().read(move |state| Ok(state.mls.direct(&peer)?.is_some())).await? {
            return Ok(());
        }
        // An earlier attempt may have been interrupted.
        self.run_changes(None).await?;
        if self.store().read(move |state| Ok(state.mls.direct(&peer)?.is_some())).await? {
            return Ok(());
        }
        let person = self.person(peer).await?;
        self.begin_direct(&person, UnixMillis(0)).await.map(drop)
    }

    /// Creates a direct group with all devices of a person and of this account.
    ///
    /// The time of its creation is after `after`, so that both sides send to this group.
    pub(super) async fn begin_direct(
        &self,
        person: &Person,
        after: UnixMillis,
    ) -> Result<GroupId, Error> {
        let mut add = self.fetch_packages(person).await?;
        add.extend(self.fetch_own_packages().await?);
        let peer = person.identity;
        let group = self
            .store()
            .change(move |state| {
                let at = UnixMillis(now().0.max(after.0));
                Ok(state.mls.create_direct(peer, at)?)
            })
            .await?;
        match self.change_group(group, Change { add, ..Change::default() }).await {
            Ok(SendOutcome::Queued(Some(reason))) => Err(reason.into()),
            Ok(_) => Ok(group),
            Err(error) => {
                self.store().change(move |state| Ok(state.mls.forget(&group)?)).await?;
                Err(error)
            }
        }
    }

    /// Returns the outcome for a message, from the result of the flush after it.
    pub(super) async fn outcome(
        &self,
        flushed: Result<(), Error>,
        entry: Option<EntryId>,
    ) -> Result<SendOutcome, Error> {
        let reason = match flushed {
            Ok(()) => None,
            Err(Error::Call(error)) => Some(error),
            Err(error) => return Err(error),
        };
        let delivery = match entry {
            Some(entry) => self.delivery(entry).await?,
            None if !self.has_unsent().await? => Some(DeliveryState::Sent),
            None => Some(DeliveryState::Queued),
        };
        Ok(match delivery {
            Some(DeliveryState::Queued) => SendOutcome::Queued(reason),
            Some(DeliveryState::Failed) => SendOutcome::Refused,
            Some(DeliveryState::Sent) | None => SendOutcome::Sent,
        })
    }
}

/// The content of the outbox when a task begins to send it.
struct Backlog {
    /// The last item that was sent.
    from: Option<OutboxPosition>,
    end: OutboxPosition,
    /// The recipients to which a message could not be sent now. Later messages are not sent to them
    /// either, to keep the order.
    stopped: BTreeSet<IdentityKey>,
}

/// Whether a backlog has unsent items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unsent {
    Some,
    Nothing,
}

pub(super) fn group_of(conversation: ConversationId) -> Result<GroupId, Error> {
    match conversation {
        ConversationId::Group(id) => Ok(id),
        ConversationId::Direct(_) => Err(qpq_mls::Error::DirectIsForTwo.into()),
    }
}

fn encrypt(
    state: &mut State,
    conversation: ConversationId,
    text: String,
    file: Option<SharedFile>,
) -> Result<EntryId, Error> {
    let delivery = DeliveryState::Queued;
    let sent = Event::Sent { text: text.clone(), delivery, file: file.clone() };
    let entry = state.log.push_own(conversation, now(), sent)?;
    encrypt_entry(state, conversation, entry, text, file)?;
    Ok(entry)
}

/// Encrypts a message of ours that has an entry, and puts it in the outbox.
pub(super) fn encrypt_entry(
    state: &mut State,
    conversation: ConversationId,
    entry: EntryId,
    text: String,
    file: Option<SharedFile>,
) -> Result<(), Error> {
    let group = match conversation {
        ConversationId::Direct(peer) => {
            state.mls.direct(&peer)?.ok_or(Error::NoSuchConversation)?
        }
        ConversationId::Group(id) => id,
    };
    let at = now();
    let id = *fresh_message_id(at).as_bytes();
    let content = Content { id, sent_at: at.0, text, repeats: None, file };
    state.count_encryption()?;
    let parcel = state.mls.encrypt(group, &content).map_err(|error| match error {
        qpq_mls::Error::UnknownGroup => Error::NoSuchConversation,
        other => other.into(),
    })?;
    state.note_sent(&parcel.payload, entry, at)?;
    Ok(state.outbox.push(parcel, Some(entry), at)?)
}

/// Stores the server's answer to an item, and notes it in the history.
fn settle(
    state: &mut State,
    place: OutboxPosition,
    statuses: &[(IdentityKey, RecipientStatus)],
) -> Result<(), Error> {
    let settled = state.outbox.settle(place, statuses)?;
    let kept = match settled.entry {
        Some(entry) => state.log.get(entry)?,
        None => None,
    };
    let conversation = kept.as_ref().and_then(|kept| kept.entry.conversation);
    for (to, reason) in &settled.refused {
        let refused = Event::Undeliverable { to: *to, reason: reason.clone() };
        state.log.push(conversation, now(), refused)?;
    }
    let Some(Event::Sent { delivery, .. }) = kept.as_ref().map(|kept| &kept.entry.event) else {
        return Ok(());
    };
    let entry = kept.as_ref().map(|kept| kept.entry.id).expect("it was matched");
    if !settled.refused.is_empty() {
        state.log.set_delivery(entry, DeliveryState::Failed)?;
    } else if settled.done && *delivery == DeliveryState::Queued {
        state.log.set_delivery(entry, DeliveryState::Sent)?;
    }
    Ok(())
}
