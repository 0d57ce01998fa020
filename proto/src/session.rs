//! The session token of a request, read and written without knowing the request's type: field 15 of every message
//! that needs a session. The server reads it before it decodes the message, the client appends it after encoding.

use bytes::BufMut;
use prost::encoding::{
    DecodeContext, WireType, check_wire_type, decode_key, decode_varint, encode_key, skip_field,
};

/// The number of `session_token` in every request that has one.
pub const SESSION_TOKEN_FIELD: u32 = 15;

/// The bytes are not a protobuf message, or their field 15 is not a byte string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a well-formed request")]
pub struct Malformed;

impl From<prost::DecodeError> for Malformed {
    fn from(_: prost::DecodeError) -> Self {
        Self
    }
}

/// Finds the session token in a serialized request. `None` when there is none or it is empty, which protobuf does not
/// tell apart. Where the field is repeated the last one counts, as in protobuf. Nothing is copied.
///
/// It accepts whatever a generated message would accept, so a request is never refused for what stands beside the token.
pub fn session_token(payload: &[u8]) -> Result<Option<&[u8]>, Malformed> {
    let mut rest = payload;
    let mut token = None;
    while !rest.is_empty() {
        let (field, wire_type) = decode_key(&mut rest)?;
        if field == SESSION_TOKEN_FIELD {
            check_wire_type(WireType::LengthDelimited, wire_type)?;
            let len = usize::try_from(decode_varint(&mut rest)?).map_err(|_| Malformed)?;
            let (value, after) = rest.split_at_checked(len).ok_or(Malformed)?;
            token = Some(value);
            rest = after;
        } else {
            skip_field(wire_type, field, &mut rest, DecodeContext::default())?;
        }
    }
    Ok(token.filter(|token| !token.is_empty()))
}

/// Appends the session token to a serialized request of any type. It counts even if the message had one already.
pub fn append_session_token(payload: &mut impl BufMut, token: &[u8]) {
    encode_key(SESSION_TOKEN_FIELD, WireType::LengthDelimited, payload);
    prost::encode_length_delimiter(token.len(), payload)
        .expect("a BufMut that grows, or has room for the token");
    payload.put_slice(token);
}
