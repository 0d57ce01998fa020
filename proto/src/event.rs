//! The events that the server sends after Subscribe. Each is a frame with a type and a message.

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::v1::{
    DevicesChangedEvent, DrainingEvent, KeyPackagesLowEvent, MessageEvent, SessionRevokedEvent,
    WakeEvent,
};

/// The type number in an event frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum EventType {
    /// A new message is in the inbox.
    Wake = 1,
    /// A new message, with its payload.
    Message = 2,
    /// The session of the subscription has ended.
    SessionRevoked = 3,
    /// The edge drains; the client reconnects.
    Draining = 4,
    /// Few KeyPackages are left.
    KeyPackagesLow = 5,
    /// The devices of the account have changed.
    DevicesChanged = 6,
}

impl EventType {
    /// All types, by number.
    pub const ALL: [Self; 6] = [
        Self::Wake,
        Self::Message,
        Self::SessionRevoked,
        Self::Draining,
        Self::KeyPackagesLow,
        Self::DevicesChanged,
    ];

    /// Returns the number on the wire.
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// Returns the type with this number, `None` for one of a later version, which a client
    /// ignores.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.code() == code)
    }

    /// Returns the name in documents, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Message => "Message",
            Self::SessionRevoked => "SessionRevoked",
            Self::Draining => "Draining",
            Self::KeyPackagesLow => "KeyPackagesLow",
            Self::DevicesChanged => "DevicesChanged",
        }
    }
}

/// An event with its message; see [`EventType`] for the meanings.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "`EventType` describes each event")]
pub enum ServerEvent {
    Wake(WakeEvent),
    Message(MessageEvent),
    SessionRevoked(SessionRevokedEvent),
    Draining(DrainingEvent),
    KeyPackagesLow(KeyPackagesLowEvent),
    DevicesChanged(DevicesChangedEvent),
}

impl ServerEvent {
    /// Returns the type of the event.
    pub const fn event_type(&self) -> EventType {
        match self {
            Self::Wake(_) => EventType::Wake,
            Self::Message(_) => EventType::Message,
            Self::SessionRevoked(_) => EventType::SessionRevoked,
            Self::Draining(_) => EventType::Draining,
            Self::KeyPackagesLow(_) => EventType::KeyPackagesLow,
            Self::DevicesChanged(_) => EventType::DevicesChanged,
        }
    }

    /// Encodes the payload of the event's frame.
    pub fn payload(&self) -> Bytes {
        let bytes = match self {
            Self::Wake(event) => event.encode_to_vec(),
            Self::Message(event) => event.encode_to_vec(),
            Self::SessionRevoked(event) => event.encode_to_vec(),
            Self::Draining(event) => event.encode_to_vec(),
            Self::KeyPackagesLow(event) => event.encode_to_vec(),
            Self::DevicesChanged(event) => event.encode_to_vec(),
        };
        bytes.into()
    }

    /// Decodes the payload of a frame. Returns `None` for a type of a later version.
    pub fn decode(event_type: u16, payload: Bytes) -> Result<Option<Self>, DecodeError> {
        let Some(event_type) = EventType::from_code(event_type) else { return Ok(None) };
        let event = match event_type {
            EventType::Wake => Self::Wake(WakeEvent::decode(payload)?),
            EventType::Message => Self::Message(MessageEvent::decode(payload)?),
            EventType::SessionRevoked => {
                Self::SessionRevoked(SessionRevokedEvent::decode(payload)?)
            }
            EventType::Draining => Self::Draining(DrainingEvent::decode(payload)?),
            EventType::KeyPackagesLow => {
                Self::KeyPackagesLow(KeyPackagesLowEvent::decode(payload)?)
            }
            EventType::DevicesChanged => {
                Self::DevicesChanged(DevicesChangedEvent::decode(payload)?)
            }
        };
        Ok(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::Envelope;

    #[test]
    fn every_event_round_trips() {
        let envelope =
            Envelope { seq: 7, data: Bytes::from_static(b"hello"), ..Envelope::default() };
        let events = [
            ServerEvent::Wake(WakeEvent { channel_id: vec![1; 16].into(), seq: 7 }),
            ServerEvent::Message(MessageEvent { envelope: Some(envelope) }),
            ServerEvent::SessionRevoked(SessionRevokedEvent { reason: "logout".into() }),
            ServerEvent::Draining(DrainingEvent { deadline_ms: 30_000 }),
            ServerEvent::KeyPackagesLow(KeyPackagesLowEvent { available: 3 }),
            ServerEvent::DevicesChanged(DevicesChangedEvent {}),
        ];
        for (event, number) in events.into_iter().zip(1..) {
            assert_eq!(event.event_type().code(), number);
            assert_eq!(ServerEvent::decode(number, event.payload()), Ok(Some(event)));
        }
    }

    #[test]
    fn an_unknown_event_is_ignored_and_a_malformed_one_is_an_error() {
        assert_eq!(ServerEvent::decode(7, Bytes::from_static(b"\xff")), Ok(None));
        assert_eq!(ServerEvent::decode(0, Bytes::new()), Ok(None));
        assert!(ServerEvent::decode(1, Bytes::from_static(b"\xff")).is_err());
    }
}
