//! The event frame. Events follow one another on a unidirectional stream that the server opens.
//!
//! [`EventDecoder`] decodes incrementally, because an event stream is not read to its end.

use bytes::{Bytes, BytesMut};

use crate::{FrameError, check_exact, check_payload_len, join, payload_len, split_header};

/// The header of an event frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventHeader {
    /// The type of the event. Later versions add types, so clients ignore unknown ones.
    pub event_type: u16,
    /// The length of the payload that follows, in bytes.
    pub payload_len: u32,
}

impl EventHeader {
    /// The length of the header in bytes.
    pub const LEN: usize = 6;

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&self.event_type.to_be_bytes());
        bytes[2..].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes
    }

    /// Decodes a header. Never fails; see [`check`](Self::check).
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let [t0, t1, l0, l1, l2, l3] = *bytes;
        Self {
            event_type: u16::from_be_bytes([t0, t1]),
            payload_len: u32::from_be_bytes([l0, l1, l2, l3]),
        }
    }

    /// Refuses a payload length above the maximum.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn check(&self) -> Result<(), FrameError> {
        check_payload_len(self.payload_len)
    }
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventFrame {
    /// The type of the event.
    pub event_type: u16,
    /// The serialized message of the event.
    pub payload: Bytes,
}

impl EventFrame {
    /// Returns the header of this event.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn header(&self) -> Result<EventHeader, FrameError> {
        Ok(EventHeader { event_type: self.event_type, payload_len: payload_len(&self.payload)? })
    }

    /// Encodes the frame.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn encode(&self) -> Result<Bytes, FrameError> {
        Ok(join(&self.header()?.encode(), &self.payload))
    }

    /// Decodes exactly one frame. The payload shares the memory of `frame`.
    ///
    /// # Errors
    /// Any [`FrameError`].
    pub fn decode(mut frame: Bytes) -> Result<Self, FrameError> {
        let header = EventHeader::decode(&split_header(&mut frame)?);
        header.check()?;
        check_exact(&frame, header.payload_len)?;
        Ok(Self { event_type: header.event_type, payload: frame })
    }
}

/// Decodes an event stream that arrives in pieces of any size.
///
/// Buffers at most one frame and one piece, if [`next_event`](Self::next_event) is called until
/// `None` after each push.
#[derive(Debug, Default)]
pub struct EventDecoder {
    buffer: BytesMut,
}

impl EventDecoder {
    /// Creates a decoder for a new stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next event, or `None` until all its bytes have been pushed.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`], also for each later call, because the start of the next frame is
    /// unknown.
    pub fn next_event(&mut self) -> Result<Option<EventFrame>, FrameError> {
        let Some(header) = self.buffer.first_chunk() else { return Ok(None) };
        let header = EventHeader::decode(header);
        header.check()?;
        let frame_len = EventHeader::LEN + header.payload_len as usize;
        if self.buffer.len() < frame_len {
            return Ok(None);
        }
        let payload = self.buffer.split_to(frame_len).freeze().slice(EventHeader::LEN..);
        Ok(Some(EventFrame { event_type: header.event_type, payload }))
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] inside a frame, [`FrameError::TooLarge`] as in
    /// [`next_event`](Self::next_event), [`FrameError::TrailingBytes`] if a complete event is left.
    pub fn finish(self) -> Result<(), FrameError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let event = EventFrame::decode(self.buffer.freeze())?;
        Err(FrameError::TrailingBytes { extra: EventHeader::LEN + event.payload.len() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::MAX_PAYLOAD;

    fn drain(decoder: &mut EventDecoder) -> Result<Vec<EventFrame>, FrameError> {
        std::iter::from_fn(|| decoder.next_event().transpose()).collect()
    }

    #[test]
    fn encoded_event_has_the_documented_layout() {
        let event = EventFrame { event_type: 0x0102, payload: Bytes::from_static(b"ab") };
        assert_eq!(&event.encode().unwrap()[..], [1, 2, 0, 0, 0, 2, b'a', b'b']);
    }

    #[test]
    fn a_length_above_the_maximum_ends_decoding() {
        let too_large = FrameError::TooLarge { len: u64::from(u32::MAX), max: MAX_PAYLOAD };
        let mut decoder = EventDecoder::new();
        decoder.push(&EventHeader { event_type: 1, payload_len: u32::MAX }.encode());
        assert_eq!(decoder.next_event(), Err(too_large));
        decoder.push(&EventFrame { event_type: 1, payload: Bytes::new() }.encode().unwrap());
        assert_eq!(decoder.next_event(), Err(too_large));
        assert_eq!(decoder.finish(), Err(too_large));
    }

    proptest! {
        #[test]
        fn an_encoded_event_decodes_to_itself(event_type: u16, payload: Vec<u8>) {
            let event = EventFrame { event_type, payload: payload.into() };
            prop_assert_eq!(EventFrame::decode(event.encode().unwrap()), Ok(event));
        }

        #[test]
        fn a_decoded_header_encodes_to_the_same_bytes(bytes: [u8; EventHeader::LEN]) {
            prop_assert_eq!(EventHeader::decode(&bytes).encode(), bytes);
        }

        #[test]
        fn a_frame_of_the_wrong_length_is_refused(payload: Vec<u8>) {
            let event = EventFrame { event_type: 7, payload: payload.into() };
            let frame = event.encode().unwrap();
            let header = event.header().unwrap();
            prop_assert_eq!(frame.len(), EventHeader::LEN + header.payload_len as usize);
            for cut in 1..frame.len() {
                let end = if cut < EventHeader::LEN { EventHeader::LEN } else { frame.len() };
                let missing = end - cut;
                let truncated = Err(FrameError::Truncated { missing });
                prop_assert_eq!(EventFrame::decode(frame.slice(..cut)), truncated);
                let mut decoder = EventDecoder::new();
                decoder.push(&frame[..cut]);
                prop_assert_eq!(decoder.next_event(), Ok(None));
                prop_assert_eq!(decoder.finish(), Err(FrameError::Truncated { missing }));
            }
            let mut longer = frame.to_vec();
            longer.push(0);
            let too_long = Err(FrameError::TrailingBytes { extra: 1 });
            prop_assert_eq!(EventFrame::decode(longer.into()), too_long);
        }

        #[test]
        fn events_are_the_same_for_any_piece_size(
            events in prop::collection::vec((any::<u16>(), any::<Vec<u8>>()), 0..8),
            piece in 1usize..64,
        ) {
            let events: Vec<EventFrame> =
                events
                    .into_iter()
                    .map(|(event_type, p)| EventFrame { event_type, payload: p.into() })
                    .collect();
            let stream: Vec<u8> = events.iter().flat_map(|event| event.encode().unwrap()).collect();
            let mut decoder = EventDecoder::new();
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                decoder.push(bytes);
                seen.extend(drain(&mut decoder).unwrap());
            }
            prop_assert_eq!(seen, events);
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn arbitrary_bytes_decode_to_events_or_an_error(
            pieces in prop::collection::vec(any::<Vec<u8>>(), 0..8),
        ) {
            let stream = pieces.concat();
            let mut decoder = EventDecoder::new();
            let mut seen = Vec::new();
            for bytes in &pieces {
                decoder.push(bytes);
                match drain(&mut decoder) {
                    Ok(events) => seen.extend(events),
                    Err(_) => break,
                }
            }
            let again: Vec<u8> = seen.iter().flat_map(|event| event.encode().unwrap()).collect();
            prop_assert!(stream.starts_with(&again));
            let _ = EventFrame::decode(stream.into());
        }
    }
}
