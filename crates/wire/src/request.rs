//! The request frame, which is alone on the client's half of a bidirectional stream and followed by
//! FIN.

use bytes::Bytes;

use crate::{FrameError, check_exact, check_payload_len, join, payload_len, split_header};

/// The header of a request frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// The id of the called method. Later versions add methods.
    pub method_id: u16,
    /// The client's number for the call, returned in the response.
    pub request_id: u32,
    /// The length of the payload that follows, in bytes.
    pub payload_len: u32,
}

impl RequestHeader {
    /// The length of the header in bytes.
    pub const LEN: usize = 10;

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&self.method_id.to_be_bytes());
        bytes[2..6].copy_from_slice(&self.request_id.to_be_bytes());
        bytes[6..].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes
    }

    /// Decodes a header. Never fails; see [`check`](Self::check).
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let [m0, m1, r0, r1, r2, r3, l0, l1, l2, l3] = *bytes;
        Self {
            method_id: u16::from_be_bytes([m0, m1]),
            request_id: u32::from_be_bytes([r0, r1, r2, r3]),
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

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The id of the called method.
    pub method_id: u16,
    /// The client's number for the call.
    pub request_id: u32,
    /// The serialized request message of the method.
    pub payload: Bytes,
}

impl Request {
    /// Returns the header of this request.
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
    fn encoded_request_has_the_documented_layout() {
        let request = Request {
            method_id: 0x0102,
            request_id: 0x0304_0506,
            payload: Bytes::from_static(b"ab"),
        };
        assert_eq!(&request.encode().unwrap()[..], [1, 2, 3, 4, 5, 6, 0, 0, 0, 2, b'a', b'b']);
    }

    #[test]
    fn a_payload_above_the_maximum_is_refused() {
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
        fn an_encoded_request_decodes_to_itself(method_id: u16, request_id: u32, payload: Vec<u8>) {
            let request = Request { method_id, request_id, payload: payload.into() };
            prop_assert_eq!(Request::decode(request.encode().unwrap()), Ok(request));
        }

        #[test]
        fn a_decoded_header_encodes_to_the_same_bytes(bytes: [u8; RequestHeader::LEN]) {
            prop_assert_eq!(RequestHeader::decode(&bytes).encode(), bytes);
        }

        #[test]
        fn a_frame_of_the_wrong_length_is_refused(payload: Vec<u8>) {
            let request = Request { method_id: 7, request_id: 9, payload: payload.into() };
            let frame = request.encode().unwrap();
            let header = request.header().unwrap();
            prop_assert_eq!(frame.len(), RequestHeader::LEN + header.payload_len as usize);
            for cut in 0..frame.len() {
                let end = if cut < RequestHeader::LEN { RequestHeader::LEN } else { frame.len() };
                let expected = end - cut;
                prop_assert_eq!(
                    Request::decode(frame.slice(..cut)),
                    Err(FrameError::Truncated { missing: expected })
                );
            }
            let mut longer = frame.to_vec();
            longer.push(0);
            let too_long = Err(FrameError::TrailingBytes { extra: 1 });
            prop_assert_eq!(Request::decode(longer.into()), too_long);
        }

        #[test]
        fn arbitrary_bytes_decode_to_a_request_or_an_error(bytes: Vec<u8>) {
            if let Ok(request) = Request::decode(bytes.clone().into()) {
                prop_assert_eq!(&request.encode().unwrap()[..], &bytes[..]);
            }
        }
    }
}
