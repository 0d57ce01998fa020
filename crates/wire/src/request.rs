//! The request frame: alone, followed by FIN, on the client's half of a bidirectional stream.

use bytes::Bytes;

use crate::{FrameError, check_exact, check_payload_len, join, payload_len, split_header};

/// What comes before a request's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Which method is called; an open number, since new methods are added.
    pub method_id: u16,
    /// The client's own number for the call, echoed in the response.
    pub request_id: u32,
    /// Length in bytes of the payload that follows.
    pub payload_len: u32,
}

impl RequestHeader {
    /// Length of the header in bytes.
    pub const LEN: usize = 10;

    /// The header as sent.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&self.method_id.to_be_bytes());
        bytes[2..6].copy_from_slice(&self.request_id.to_be_bytes());
        bytes[6..].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes
    }

    /// Reads a header. Any ten bytes are one; see [`check`](Self::check).
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let [m0, m1, r0, r1, r2, r3, l0, l1, l2, l3] = *bytes;
        Self {
            method_id: u16::from_be_bytes([m0, m1]),
            request_id: u32::from_be_bytes([r0, r1, r2, r3]),
            payload_len: u32::from_be_bytes([l0, l1, l2, l3]),
        }
    }

    /// Whether the announced payload may be read at all.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn check(&self) -> Result<(), FrameError> {
        check_payload_len(self.payload_len)
    }
}

/// A whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Which method is called.
    pub method_id: u16,
    /// The client's own number for the call.
    pub request_id: u32,
    /// The method's message, serialized.
    pub payload: Bytes,
}

impl Request {
    /// The header that announces this request.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn header(&self) -> Result<RequestHeader, FrameError> {
        Ok(RequestHeader {
            method_id: self.method_id,
            request_id: self.request_id,
            payload_len: payload_len(&self.payload)?,
        })
    }

    /// The whole frame.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn encode(&self) -> Result<Bytes, FrameError> {
        Ok(join(&self.header()?.encode(), &self.payload))
    }

    /// Reads a frame that is all of `frame`; the payload shares its memory.
    ///
    /// # Errors
    /// Any [`FrameError`].
    pub fn decode(mut frame: Bytes) -> Result<Self, FrameError> {
        let header = RequestHeader::decode(&split_header(&mut frame)?);
        header.check()?;
        check_exact(&frame, header.payload_len)?;
        Ok(Self { method_id: header.method_id, request_id: header.request_id, payload: frame })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::MAX_PAYLOAD;

    #[test]
    fn layout_is_that_of_the_protocol() {
        let request = Request {
            method_id: 0x0102,
            request_id: 0x0304_0506,
            payload: Bytes::from_static(b"ab"),
        };
        assert_eq!(&request.encode().unwrap()[..], [1, 2, 3, 4, 5, 6, 0, 0, 0, 2, b'a', b'b']);
    }

    #[test]
    fn the_largest_payload_passes_and_one_more_byte_does_not() {
        let of = |len: u32| Request {
            method_id: 1,
            request_id: 2,
            payload: vec![0; len as usize].into(),
        };
        assert_eq!(Request::decode(of(MAX_PAYLOAD).encode().unwrap()), Ok(of(MAX_PAYLOAD)));
        let too_large = FrameError::TooLarge { len: u64::from(MAX_PAYLOAD) + 1, max: MAX_PAYLOAD };
        assert_eq!(of(MAX_PAYLOAD + 1).encode(), Err(too_large));
        let header = RequestHeader { method_id: 1, request_id: 2, payload_len: MAX_PAYLOAD + 1 };
        assert_eq!(header.check(), Err(too_large));
        assert_eq!(Request::decode(Bytes::copy_from_slice(&header.encode())), Err(too_large));
    }

    proptest! {
        #[test]
        fn round_trip(method_id: u16, request_id: u32, payload: Vec<u8>) {
            let request = Request { method_id, request_id, payload: payload.into() };
            prop_assert_eq!(Request::decode(request.encode().unwrap()), Ok(request));
        }

        #[test]
        fn header_round_trip(bytes: [u8; RequestHeader::LEN]) {
            prop_assert_eq!(RequestHeader::decode(&bytes).encode(), bytes);
        }

        #[test]
        fn the_length_is_honest(payload: Vec<u8>) {
            let request = Request { method_id: 7, request_id: 9, payload: payload.into() };
            let frame = request.encode().unwrap();
            prop_assert_eq!(frame.len(), RequestHeader::LEN + request.header().unwrap().payload_len as usize);
            for cut in 0..frame.len() {
                let expected = if cut < RequestHeader::LEN { RequestHeader::LEN - cut } else { frame.len() - cut };
                prop_assert_eq!(
                    Request::decode(frame.slice(..cut)),
                    Err(FrameError::Truncated { missing: expected })
                );
            }
            let mut longer = frame.to_vec();
            longer.push(0);
            prop_assert_eq!(Request::decode(longer.into()), Err(FrameError::TrailingBytes { extra: 1 }));
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes: Vec<u8>) {
            if let Ok(request) = Request::decode(bytes.clone().into()) {
                prop_assert_eq!(&request.encode().unwrap()[..], &bytes[..]);
            }
        }
    }
}
