//! Framing of the qpq v1 wire protocol, without I/O: the layout of requests, responses and events
//! on a QUIC stream.
//!
//! A call is one request frame and one response frame, each alone on its half of a bidirectional
//! stream. Events follow one another on a unidirectional stream that the server opens. A frame is a
//! header of fixed length with big-endian integers, and a payload whose length is in the header.
//! `qpq-transport` reads and writes frames with these types; no other crate depends on the layout.
//!
//! Decoding a header never fails, because the answer to a request with too large a length contains
//! its request id. The header's `check` refuses such a length before memory is allocated.
//!
//! | frame | layout | header |
//! |---|---|---|
//! | [`Request`] | `method_id u16` · `request_id u32` · `payload_len u32` · payload | 10 bytes |
//! | [`Response`] | `status u8` · `request_id u32` · `payload_len u32` · payload | 9 bytes |
//! | [`EventFrame`] | `event_type u16` · `payload_len u32` · payload | 6 bytes |

mod error;
mod event;
mod refusal;
mod request;
mod response;

pub use error::FrameError;
pub use event::{EventDecoder, EventFrame, EventHeader};
pub use refusal::Refusal;
pub use request::{Request, RequestHeader};
pub use response::{Response, ResponseHeader};

use bytes::Bytes;

/// The largest payload of any frame in bytes, in both directions: 4 MiB.
pub const MAX_PAYLOAD: u32 = 4 * 1024 * 1024;

/// Refuses an announced payload length above [`MAX_PAYLOAD`].
fn check_payload_len(len: u32) -> Result<(), FrameError> {
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLarge { len: u64::from(len), max: MAX_PAYLOAD });
    }
    Ok(())
}

/// Returns the length of `payload` for the header.
fn payload_len(payload: &Bytes) -> Result<u32, FrameError> {
    u32::try_from(payload.len())
        .ok()
        .filter(|len| *len <= MAX_PAYLOAD)
        .ok_or(FrameError::TooLarge { len: payload.len() as u64, max: MAX_PAYLOAD })
}

/// Removes the header from the start of a frame.
fn split_header<const N: usize>(bytes: &mut Bytes) -> Result<[u8; N], FrameError> {
    let Some(header) = bytes.first_chunk::<N>().copied() else {
        return Err(FrameError::Truncated { missing: N - bytes.len() });
    };
    let _ = bytes.split_to(N);
    Ok(header)
}

/// Checks that the payload has exactly the announced length.
fn check_exact(payload: &Bytes, announced: u32) -> Result<(), FrameError> {
    let announced = announced as usize;
    match payload.len() {
        len if len < announced => Err(FrameError::Truncated { missing: announced - len }),
        len if len > announced => Err(FrameError::TrailingBytes { extra: len - announced }),
        _ => Ok(()),
    }
}

/// Concatenates a header and a payload.
fn join(header: &[u8], payload: &Bytes) -> Bytes {
    let mut frame = Vec::with_capacity(header.len() + payload.len());
    frame.extend_from_slice(header);
    frame.extend_from_slice(payload);
    frame.into()
}
