//! Framing of the qpq v1 wire protocol, without I/O: how requests, responses and events lie on a
//! QUIC stream.
//!
//! One call is one request frame and one response frame, each alone on its half of a stream; events
//! follow one another on a stream of the server's. A frame is a fixed header of big-endian integers
//! and a payload whose length the header gives. `qpq-transport` reads and writes frames with the
//! types here; nothing else needs to know the layout.
//!
//! A header decodes whatever its bytes are, because a peer that announces too much must still be
//! answered by its request id. Whether the announced length is acceptable is the header's `check`,
//! asked before any memory is taken.
//!
//! | frame | layout | header |
//! |---|---|---|
//! | [`Request`] | `method_id u16` · `request_id u32` · `payload_len u32` · payload | 10 bytes |
//! | [`Response`] | `status u8` · `request_id u32` · `payload_len u32` · payload | 9 bytes |
//! | [`Event`] | `event_type u16` · `payload_len u32` · payload | 6 bytes |

mod error;
mod event;
mod request;
mod response;

pub use error::FrameError;
pub use event::{Event, EventDecoder, EventHeader};
pub use request::{Request, RequestHeader};
pub use response::{Response, ResponseHeader};

use bytes::Bytes;

/// The largest payload of any frame, in bytes (4 MiB), both ways.
pub const MAX_PAYLOAD: u32 = 4 * 1024 * 1024;

/// Refuses an announced payload length above [`MAX_PAYLOAD`].
fn check_payload_len(len: u32) -> Result<(), FrameError> {
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLarge { len: u64::from(len), max: MAX_PAYLOAD });
    }
    Ok(())
}

/// The length a header announces for `payload`.
fn payload_len(payload: &Bytes) -> Result<u32, FrameError> {
    u32::try_from(payload.len())
        .ok()
        .filter(|len| *len <= MAX_PAYLOAD)
        .ok_or(FrameError::TooLarge { len: payload.len() as u64, max: MAX_PAYLOAD })
}

/// Splits off the header of a frame that should be `bytes` and nothing else.
fn split_header<const N: usize>(bytes: &mut Bytes) -> Result<[u8; N], FrameError> {
    let Some(header) = bytes.first_chunk::<N>().copied() else {
        return Err(FrameError::Truncated { missing: N - bytes.len() });
    };
    let _ = bytes.split_to(N);
    Ok(header)
}

/// Checks that what follows a header is exactly the payload it announced.
fn check_exact(payload: &Bytes, announced: u32) -> Result<(), FrameError> {
    let announced = announced as usize;
    match payload.len() {
        len if len < announced => Err(FrameError::Truncated { missing: announced - len }),
        len if len > announced => Err(FrameError::TrailingBytes { extra: len - announced }),
        _ => Ok(()),
    }
}

/// Header and payload as one piece of memory.
fn join(header: &[u8], payload: &Bytes) -> Bytes {
    let mut frame = Vec::with_capacity(header.len() + payload.len());
    frame.extend_from_slice(header);
    frame.extend_from_slice(payload);
    frame.into()
}
