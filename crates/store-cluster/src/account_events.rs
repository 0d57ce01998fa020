//! AccountEvents between edges, over NATS. While nothing is heard through it, whoever waits here is told
//! every now and then that sessions may have ended; each then looks its own up, which no copy of
//! stands in the way of for long.

use std::{mem, sync::Arc, time::Duration};

use futures_util::stream::{self, BoxStream};
use qpq_domain::IdentityKey;
use qpq_ports::{AccountEvent, AccountEvents};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::{Instant, sleep_until},
};

use crate::{
    nats::{Bus, Heard},
    sessions::ClusterSessions,
    wakes::Waking,
};

/// The port over the bus.
#[derive(Clone, Debug)]
pub(crate) struct ClusterAccountEvents {
    pub(crate) bus: Bus,
    pub(crate) sessions: Arc<ClusterSessions>,
    pub(crate) waking: Waking,
    /// Between two such looks.
    pub(crate) every: Duration,
}

impl AccountEvents for ClusterAccountEvents {
    fn publish(&self, identity: &IdentityKey, event: AccountEvent) {
        self.bus.event(*identity, event);
    }

    fn listen(&self) -> BoxStream<'static, (IdentityKey, AccountEvent)> {
        let listener = Listener {
            heard: self.bus.hear(),
            to_look: Vec::new(),
            missed: Missed::Nothing,
            next_look: Instant::now() + self.every,
            account_events: self.clone(),
        };
        Box::pin(stream::unfold(listener, |mut listener| async {
            let event = listener.next().await?;
            Some((event, listener))
        }))
    }
}

/// Whether other edges may have said something that was not heard here.
#[derive(PartialEq, Eq)]
enum Missed {
    Nothing,
    Something,
}

struct Listener {
    heard: Receiver<Heard>,
    /// Who is still to be told to look.
    to_look: Vec<IdentityKey>,
    missed: Missed,
    next_look: Instant,
    account_events: ClusterAccountEvents,
}

impl Listener {
    async fn next(&mut self) -> Option<(IdentityKey, AccountEvent)> {
        loop {
            if let Some(identity) = self.to_look.pop() {
                return Some((identity, AccountEvent::SessionsEnded));
            }
            tokio::select! {
                word = self.heard.recv() => match word {
                    Ok(Heard::AccountEvent(identity, event)) => return Some((identity, event)),
                    // Comes before the notice of it, and whoever hears that looks the session up at
                    // once: the copy here must be gone by then, whether or not anybody else who
                    // forgets it has had a turn.
                    Ok(Heard::SessionEnded(token)) => self.account_events.sessions.forget(&token),
                    Ok(Heard::Wake(..)) => {}
                    Err(RecvError::Lagged(_)) => self.look_anew(),
                    Err(RecvError::Closed) => return None,
                },
                () = sleep_until(self.next_look) => self.look(),
            }
        }
    }

    fn look(&mut self) {
        self.next_look = Instant::now() + self.account_events.every;
        if self.account_events.bus.is_deaf() {
            self.missed = Missed::Something;
            self.to_look = self.account_events.waking.waiting();
        } else if mem::replace(&mut self.missed, Missed::Nothing) == Missed::Something {
            self.look_anew();
        }
    }

    /// Something was missed and nothing more is: believing no copy once is enough.
    fn look_anew(&mut self) {
        self.account_events.sessions.forget_all();
        self.to_look = self.account_events.waking.waiting();
    }
}
