//! Reading the inbox: Peek, take in, save, then Ack. Whatever happens in between, the next read
//! goes on where the saved state is: what was taken in is not peeked again, what was not is still
//! there.

use std::sync::atomic::Ordering;

use qpq_domain::{Seq, UnixMillis};
use qpq_mls::{Ignored, Received};
use qpq_proto::{methods, v1};

use super::{
    Messenger,
    log::{ConversationId, Entry, Event},
    send::MAX_TEXT,
    state::State,
};
use crate::error::{CallError, Error};

/// Messages taken in at once, and so saved at once.
const PAGE: u32 = 200;

impl Messenger {
    /// Takes in what the inbox has and answers everything that was not marked as seen, oldest
    /// first. Sends what is still to be sent, fills up our key packages and asks the directory
    /// about new names on the way.
    pub async fn receive(&self) -> Result<Vec<Entry>, Error> {
        let mut keys = self.sync().await?;
        if !self.shared.keys_checked.swap(true, Ordering::Relaxed) {
            keys = NewKeys::Needed;
        }
        self.settle_names().await?;
        self.settle_keys(keys).await?;
        unless_final("outbox", self.flush().await)?;
        self.unseen().await
    }

    /// Takes in what the inbox has, and leaves everything else to a [`Listener`](super::Listener)
    /// that is to follow.
    pub async fn catch_up(&self) -> Result<(), Error> {
        self.sync().await?;
        self.settle_names().await
    }

    /// Asks the directory about new names.
    pub(super) async fn settle_names(&self) -> Result<(), Error> {
        unless_final("names", self.check_names().await)
    }

    /// Fills up our key packages.
    pub(super) async fn settle_keys(&self, keys: NewKeys) -> Result<(), Error> {
        match keys {
            NewKeys::Needed => {
                let published = self.publish_key_packages().await;
                let refused = matches!(
                    &published,
                    Err(Error::Call(error)) if error.is_code("keys.invalid_package")
                );
                self.shared.keys_refused.store(refused, Ordering::Relaxed);
                unless_final("key packages", published)
            }
            NewKeys::NotNeeded => Ok(()),
        }
    }

    /// Takes in everything that the inbox has.
    pub(super) async fn sync(&self) -> Result<NewKeys, Error> {
        let mut acked = self.shared.acked.lock().await;
        let (mut keys, mut more) = (NewKeys::NotNeeded, true);
        loop {
            let cursor = self.keeper().read(|state| state.cursor).await?;
            if cursor > *acked {
                self.ack(cursor).await?;
                *acked = cursor;
            }
            if !more {
                return Ok(keys);
            }
            let page = self.peek(cursor).await?;
            more = page.more;
            if page.payloads.is_empty() {
                return Ok(keys);
            }
            // A server that gives the same again and again would keep us here for ever.
            if page.payloads.iter().all(|envelope| envelope.seq <= cursor.0) {
                return Err(CallError::Malformed { method: "Peek" }.into());
            }
            let joined =
                self.keeper().change(move |state| Ok(take_in(state, page.payloads))).await?;
            if joined == NewKeys::Needed {
                keys = NewKeys::Needed;
            }
        }
    }

    async fn peek(&self, after: Seq) -> Result<v1::PeekResponse, CallError> {
        self.client()
            .call::<methods::Peek>(v1::PeekRequest {
                all_channels: true,
                after_seq: after.0,
                limit: PAGE,
                ..Default::default()
            })
            .await
    }

    async fn ack(&self, up_to: Seq) -> Result<(), CallError> {
        self.client()
            .call::<methods::Ack>(v1::AckRequest {
                all_channels: true,
                seq_up_to: up_to.0,
                ..Default::default()
            })
            .await
            .map(drop)
    }
}

/// Passes over what failed, unless nothing at all will work until somebody does something. What the
/// server does not do now is no reason to hold messages back; it is tried again the next time.
pub(super) fn unless_final(what: &'static str, done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(Error::Call(error))
            if !error.is_unauthorized() && !matches!(error, CallError::Connect(_)) =>
        {
            tracing::warn!(%error, what, "not now");
            Ok(())
        }
        done => done,
    }
}

/// Whether somebody has used a key package of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NewKeys {
    Needed,
    NotNeeded,
}

/// Takes messages in that follow the cursor, and moves it.
fn take_in(state: &mut State, envelopes: Vec<v1::Envelope>) -> NewKeys {
    let mut keys = NewKeys::NotNeeded;
    for envelope in envelopes {
        let (seq, at) = (Seq(envelope.seq), UnixMillis(envelope.enqueued_at));
        if seq <= state.cursor {
            continue;
        }
        if seq != state.cursor.next() {
            let missing = Event::Missing { first: state.cursor.next(), last: Seq(seq.0 - 1) };
            state.log.push(None, at, missing);
        }
        for received in state.mls.receive(&envelope.data) {
            if matches!(received, Received::Joined(_)) {
                keys = NewKeys::Needed;
            }
            note(state, received, at);
        }
        state.cursor = seq;
    }
    keys
}

/// Notes what a message turned out to be.
fn note(state: &mut State, received: Received, at: UnixMillis) {
    match received {
        Received::Joined(summary) => {
            for member in &summary.members {
                state.people.claim(member.identity, &member.username);
            }
            // A direct conversation begins with its first message.
            if let conversation @ ConversationId::Group(_) =
                ConversationId::of(&summary, &state.me())
            {
                state.log.push(Some(conversation), at, Event::Joined { by: summary.maker });
            }
        }
        Received::Message { group, sender, content, .. } => {
            state.people.claim(sender.identity, &sender.username);
            let size = content.text.len();
            let event = if size <= MAX_TEXT {
                let sent_at = UnixMillis(content.sent_at);
                Event::Received { from: sender.identity, text: content.text, sent_at }
            } else {
                let name = state.people.person(&sender.identity);
                Event::Unreadable {
                    reason: format!("{name} sent {size} bytes, the most is {MAX_TEXT}"),
                }
            };
            state.log.push(state.conversation_of(&group), at, event);
        }
        Received::Committed { group, added, removed } => {
            let conversation = state.conversation_of(&group);
            for member in &added {
                state.people.claim(member.identity, &member.username);
            }
            let keys = |members: Vec<qpq_mls::Member>| {
                members.into_iter().map(|member| member.identity).collect()
            };
            if !added.is_empty() {
                state.log.push(conversation, at, Event::Added { members: keys(added) });
            }
            if !removed.is_empty() {
                state.log.push(conversation, at, Event::Removed { members: keys(removed) });
            }
        }
        Received::Buffered | Received::Duplicate | Received::Ignored(Ignored::OwnMessage) => {}
        Received::Ignored(reason) => {
            state.log.push(None, at, Event::Unreadable { reason: reason.to_string() });
        }
        // A kind of a later version of the MLS crate.
        _ => {
            state.log.push(None, at, Event::Unreadable { reason: "not understood".to_owned() });
        }
    }
}
