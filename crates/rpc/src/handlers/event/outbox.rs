//! The events that wait for a client, in the order in which they are sent.

use std::collections::BTreeMap;

use bytes::Bytes;
use qpq_domain::{ChannelId, Seq};
use qpq_proto::{
    ServerEvent,
    v1::{DevicesChangedEvent, DrainingEvent, KeyPackagesLowEvent, SessionRevokedEvent, WakeEvent},
};
use tokio::time::Instant;

/// The maximum number of channels whose Wakes wait for the client.
const MAX_WAKES: usize = 256;

/// The reason in every SessionRevoked. The client need not know more to log in again.
const SESSION_ENDED: &str = "session_ended";

/// An event that waits for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// The session has ended. Nothing is sent after it.
    SessionRevoked,
    /// The edge drains, and closes the connection at `closing_at` at the latest.
    Draining { closing_at: Instant },
    /// Only `available` KeyPackages are left.
    KeyPackagesLow { available: u32 },
    /// The devices of the account have changed.
    DevicesChanged,
    /// The newest message of a channel.
    Wake { channel: ChannelId, seq: Seq },
}

/// The position of an event in the queue. Of two events with the same position, the newer is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Position {
    SessionRevoked,
    Draining,
    KeyPackagesLow,
    DevicesChanged,
    Wake(ChannelId),
}

/// A queue of events, bounded by [`Outbox::has_space`].
#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: BTreeMap<Position, Outgoing>,
}

impl Outbox {
    /// Returns whether there is space for the Wakes of another read of the inbox.
    pub(super) fn has_space(&self) -> bool {
        self.queue.len() < MAX_WAKES
    }

    /// Adds a new event, or one that could not be sent and waits again.
    pub(super) fn push(&mut self, event: Outgoing) {
        let queued = self.queue.entry(event.position()).or_insert(event);
        *queued = match (*queued, event) {
            (Outgoing::Wake { channel, seq }, Outgoing::Wake { seq: newer, .. }) => {
                Outgoing::Wake { channel, seq: seq.max(newer) }
            }
            _ => event,
        };
    }

    /// Removes and returns the next event.
    pub(super) fn pop(&mut self) -> Option<Outgoing> {
        self.queue.pop_first().map(|(_, event)| event)
    }
}

impl Outgoing {
    const fn position(&self) -> Position {
        match self {
            Self::SessionRevoked => Position::SessionRevoked,
            Self::Draining { .. } => Position::Draining,
            Self::KeyPackagesLow { .. } => Position::KeyPackagesLow,
            Self::DevicesChanged => Position::DevicesChanged,
            Self::Wake { channel, .. } => Position::Wake(*channel),
        }
    }

    /// Returns the event as it is sent at `now`.
    pub(super) fn event(&self, now: Instant) -> ServerEvent {
        match self {
            Self::SessionRevoked => ServerEvent::SessionRevoked(SessionRevokedEvent {
                reason: SESSION_ENDED.to_owned(),
            }),
            Self::Draining { closing_at } => {
                let left = closing_at.saturating_duration_since(now).as_millis();
                let deadline_ms = u64::try_from(left).unwrap_or(u64::MAX);
                ServerEvent::Draining(DrainingEvent { deadline_ms })
            }
            Self::KeyPackagesLow { available } => {
                ServerEvent::KeyPackagesLow(KeyPackagesLowEvent { available: *available })
            }
            Self::DevicesChanged => ServerEvent::DevicesChanged(DevicesChangedEvent {}),
            Self::Wake { channel, seq } => {
                let channel_id = Bytes::copy_from_slice(channel.as_bytes());
                ServerEvent::Wake(WakeEvent { channel_id, seq: seq.0 })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wake(channel: u8, seq: u64) -> Outgoing {
        Outgoing::Wake { channel: ChannelId::new([channel; 16]), seq: Seq(seq) }
    }

    #[test]
    fn events_are_ordered_by_urgency_and_wakes_by_channel() {
        let mut outbox = Outbox::default();
        let draining = Outgoing::Draining { closing_at: Instant::now() };
        let low = Outgoing::KeyPackagesLow { available: 3 };
        for event in [wake(2, 7), wake(1, 8), low, draining, Outgoing::SessionRevoked] {
            outbox.push(event);
        }
        for event in [Outgoing::SessionRevoked, draining, low, wake(1, 8), wake(2, 7)] {
            assert_eq!(outbox.pop(), Some(event));
        }
        assert_eq!(outbox.pop(), None);
    }

    #[test]
    fn of_the_wakes_of_a_channel_the_newest_is_kept() {
        let mut outbox = Outbox::default();
        outbox.push(wake(1, 8));
        outbox.push(wake(1, 9));
        // An older event that could not be sent and is added again.
        outbox.push(wake(1, 8));
        assert_eq!(outbox.pop(), Some(wake(1, 9)));
        assert_eq!(outbox.pop(), None);
    }

    #[test]
    fn the_outbox_is_full_when_it_has_as_many_events_as_channels_may_wait() {
        let mut outbox = Outbox::default();
        for n in 0..MAX_WAKES {
            assert!(outbox.has_space(), "{n}");
            let channel = ChannelId::new([n.to_be_bytes(); 2].concat().try_into().expect("16"));
            outbox.push(Outgoing::Wake { channel, seq: Seq(1) });
        }
        assert!(!outbox.has_space());
        outbox.pop();
        assert!(outbox.has_space());
    }
}
