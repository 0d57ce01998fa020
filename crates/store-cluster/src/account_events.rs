//! Account events between edges, over NATS. While NATS delivers nothing, every account with a
//! waiting call regularly gets the event that its sessions may have ended. The call then looks its
//! session up. Copies of sessions are valid only for a short time, so the lookup finds a
//! revocation.

use std::mem;

use futures_util::stream::{self, BoxStream};
use qpq_domain::IdentityKey;
use qpq_ports::{AccountEvent, AccountEvents};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::{Instant, sleep_until},
};

use crate::{ClusterStore, nats::BusMessage};

impl AccountEvents for ClusterStore {
    fn publish(&self, identity: &IdentityKey, event: AccountEvent) {
        self.inner.bus.event(*identity, event);
    }

    fn listen(&self) -> BoxStream<'static, (IdentityKey, AccountEvent)> {
        let listener = Listener {
            messages: self.inner.bus.messages(),
            pending: Vec::new(),
            missed: Missed::Nothing,
            next_check: Instant::now() + self.inner.event_interval,
            store: self.clone(),
        };
        Box::pin(stream::unfold(listener, |mut listener| async {
            let event = listener.next().await?;
            Some((event, listener))
        }))
    }
}

/// A possible loss of messages from other edges.
#[derive(PartialEq, Eq)]
enum Missed {
    Nothing,
    Something,
}

struct Listener {
    messages: Receiver<BusMessage>,
    /// The accounts for which `SessionsEnded` is still to be returned.
    pending: Vec<IdentityKey>,
    missed: Missed,
    next_check: Instant,
    store: ClusterStore,
}

impl Listener {
    async fn next(&mut self) -> Option<(IdentityKey, AccountEvent)> {
        loop {
            if let Some(identity) = self.pending.pop() {
                return Some((identity, AccountEvent::SessionsEnded));
            }
            tokio::select! {
                message = self.messages.recv() => match message {
                    Ok(BusMessage::AccountEvent(identity, event)) => return Some((identity, event)),
                    // An account event follows this message, and its receiver looks the session up
                    // immediately, perhaps before the task that drops copies has run. So the copy
                    // is dropped here, too.
                    Ok(BusMessage::SessionEnded(token)) => {
                        self.store.inner.applier.sessions.drop_local(&token);
                    }
                    Ok(BusMessage::Wake(..)) => {}
                    Err(RecvError::Lagged(_)) => self.look_up_all(),
                    Err(RecvError::Closed) => return None,
                },
                () = sleep_until(self.next_check) => self.check(),
            }
        }
    }

    fn check(&mut self) {
        self.next_check = Instant::now() + self.store.inner.event_interval;
        if self.store.inner.bus.is_silent() {
            self.missed = Missed::Something;
            self.pending = self.store.inner.wakes.waiting();
        } else if mem::replace(&mut self.missed, Missed::Nothing) == Missed::Something {
            self.look_up_all();
        }
    }

    /// Drops all copies of sessions in this process, and makes every waiting call look its session
    /// up once.
    fn look_up_all(&mut self) {
        self.store.inner.applier.sessions.drop_all_local();
        self.pending = self.store.inner.wakes.waiting();
    }
}
