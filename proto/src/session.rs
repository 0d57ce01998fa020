//! The session token of a request, which is field 15 of every message that needs a session. The
//! server reads the token before it decodes the message, and the client appends it after encoding.
//! Neither depends on the message's type.

use bytes::BufMut;
use prost::encoding::{
    DecodeContext, WireType, check_wire_type, decode_key, decode_varint, encode_key, skip_field,
};

/// The field number of `session_token` in all requests.
pub const SESSION_TOKEN_FIELD: u32 = 15;

/// The error for bytes that are not a protobuf message, or whose field 15 is not a byte string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a well-formed request")]
pub struct Malformed;

impl From<prost::DecodeError> for Malformed {
    fn from(_: prost::DecodeError) -> Self {
        Self
    }
}

/// Returns the session token of a serialized request, without copying. `None` if it is absent or
/// empty, which protobuf does not distinguish. Of a repeated field the last one counts, as in
/// protobuf.
///
/// Accepts all bytes that a generated message accepts, so other fields never cause a refusal here.
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

/// Appends the session token to a serialized request, replacing a token already in it.
pub fn append_session_token(payload: &mut impl BufMut, token: &[u8]) {
    encode_key(SESSION_TOKEN_FIELD, WireType::LengthDelimited, payload);
    prost::encode_length_delimiter(token.len(), payload)
        .expect("the buffer grows, or has space for the token");
    payload.put_slice(token);
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::{methods::for_each_request, v1};

    /// A function that decodes bytes as one method's message and returns its token, or `None` if
    /// the bytes are refused.
    type Decode = fn(&[u8]) -> Option<Bytes>;

    macro_rules! decoders {
        ($(($auth:ident $request:ident))+) => {
            [$(decoder!($auth $request)),+].into_iter().flatten().collect()
        };
    }
    macro_rules! decoder {
        (Anonymous $request:ident) => {
            None
        };
        ($auth:ident $request:ident) => {{
            let decode: Decode =
                |bytes| v1::$request::decode(bytes).ok().map(|request| request.session_token);
            Some((stringify!($request), decode))
        }};
    }

    /// Returns all request types that have a token.
    fn authenticated() -> Vec<(&'static str, Decode)> {
        for_each_request!(decoders)
    }

    /// Checks that `session_token` agrees with each message that accepts the payload. Returns the
    /// number of these messages.
    fn agree(payload: &[u8]) -> Result<usize, TestCaseError> {
        let ours = session_token(payload);
        let mut accepted = 0;
        for (name, decode) in authenticated() {
            if let Some(theirs) = decode(payload) {
                accepted += 1;
                let theirs = (!theirs.is_empty()).then_some(theirs.as_ref());
                prop_assert_eq!(ours, Ok(theirs), "{}", name);
            }
        }
        Ok(accepted)
    }

    /// Generates an encoded field. No request has a field number above 15, so every message skips
    /// those.
    fn field(numbers: std::ops::Range<u32>) -> impl Strategy<Value = Vec<u8>> {
        let value = proptest::collection::vec(any::<u8>(), 0..200);
        (numbers, 0..4, any::<u64>(), value).prop_map(|(number, shape, varint, value)| {
            let mut bytes = Vec::new();
            match shape {
                0 => prost::encoding::uint64::encode(number, &varint, &mut bytes),
                1 => prost::encoding::fixed64::encode(number, &varint, &mut bytes),
                2 => prost::encoding::bytes::encode(number, &value, &mut bytes),
                _ => {
                    // A group, which is deprecated but must be skipped, with field 15 inside.
                    encode_key(number, WireType::StartGroup, &mut bytes);
                    append_session_token(&mut bytes, &value);
                    encode_key(number, WireType::EndGroup, &mut bytes);
                }
            }
            bytes
        })
    }

    fn token() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(|token| {
            let mut bytes = Vec::new();
            append_session_token(&mut bytes, &token);
            bytes
        })
    }

    fn payload(unknown: std::ops::Range<u32>) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![field(unknown), token()], 0..8)
            .prop_map(|fields| fields.concat())
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_as_prost_reads_them(
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            agree(&payload)?;
        }

        #[test]
        fn fields_in_any_order_are_read_as_prost_reads_them(payload in payload(1..40)) {
            agree(&payload)?;
        }

        #[test]
        fn unknown_fields_do_not_hide_the_token(payload in payload(16..5000)) {
            prop_assert_eq!(agree(&payload)?, authenticated().len());
        }

        #[test]
        fn a_truncated_payload_is_never_read_past_its_end(
            payload in payload(1..40),
            cut in any::<prop::sample::Index>(),
        ) {
            agree(&payload[..cut.index(payload.len() + 1)])?;
        }

        #[test]
        fn an_appended_token_replaces_an_earlier_one(
            payload in payload(16..40),
            token in any::<[u8; 32]>(),
        ) {
            let mut payload = payload;
            append_session_token(&mut payload, &token);
            prop_assert_eq!(session_token(&payload), Ok(Some(token.as_slice())));
        }
    }

    #[test]
    fn every_method_with_a_session_is_tested() {
        let anonymous =
            crate::METHODS.iter().filter(|m| m.auth == crate::AuthKind::Anonymous).count();
        assert_eq!(authenticated().len(), crate::METHODS.len() - anonymous);
    }

    #[test]
    fn the_last_token_counts_even_if_empty() {
        assert_eq!(session_token(b""), Ok(None));
        assert_eq!(session_token(b"\x7a\x01a\x7a\x02bc"), Ok(Some(b"bc".as_slice())));
        assert_eq!(session_token(b"\x7a\x01a\x7a\x00"), Ok(None));
    }

    #[test]
    fn malformed_messages_are_refused() {
        let cases: [&[u8]; 7] = [
            b"\x7a",                                         // no length
            b"\x7a\x02a",                                    // shorter than it says
            b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", // a length beyond any memory
            b"\x78\x01",                                     // field 15 as a number
            b"\x00\x01",                                     // field number 0
            b"\x0f\x01",                                     // no such wire type
            b"\x83\x01\x7a\x01a",                            // a group that does not end
        ];
        for case in cases {
            assert_eq!(session_token(case), Err(Malformed), "{case:?}");
        }
        let nested = b"\x83\x01".repeat(100_000);
        assert_eq!(session_token(&nested), Err(Malformed), "groups nested without end");
    }
}
