//! Bytes become types at the door: parsers for the fields of requests, each saying which field it
//! refused and why. Handlers call them first; what they get they need not check again.

use std::num::NonZeroU32;

use qpq_domain::{
    ChannelId, DeviceId, IdentityKey, InvalidUsername, MAX_BATCH, MessageId, Username, WrongLength,
};

/// A field of a request was refused. The field's name goes back to the client, the reason is for
/// the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// The field's name in the `.proto` file.
    pub field: &'static str,
    pub reason: FieldReason,
}

/// Why a field was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FieldReason {
    #[error(transparent)]
    Length(#[from] WrongLength),
    #[error(transparent)]
    Username(#[from] InvalidUsername),
    #[error("at most {max} are allowed")]
    TooMany { max: usize },
    #[error("must not be set together with other fields")]
    Conflict,
}

impl FieldError {
    pub fn new(field: &'static str, reason: impl Into<FieldReason>) -> Self {
        Self { field, reason: reason.into() }
    }
}

/// An identity key: exactly 32 bytes.
pub fn identity_key(bytes: &[u8], field: &'static str) -> Result<IdentityKey, FieldError> {
    parse(bytes, field)
}

/// An identity key that may be left out.
pub fn optional_identity_key(
    bytes: &[u8],
    field: &'static str,
) -> Result<Option<IdentityKey>, FieldError> {
    optional(bytes, field)
}

/// A list of identity keys, as long as a batch may be.
pub fn identity_keys<B: AsRef<[u8]>>(
    keys: &[B],
    field: &'static str,
) -> Result<Vec<IdentityKey>, FieldError> {
    at_most(keys.len(), MAX_BATCH, field)?;
    keys.iter().map(|key| identity_key(key.as_ref(), field)).collect()
}

/// A channel: empty for the default one, or 16 bytes.
pub fn channel_id(bytes: &[u8], field: &'static str) -> Result<ChannelId, FieldError> {
    parse(bytes, field)
}

/// A device: 16 bytes, or empty where the session's is meant.
pub fn device_id(bytes: &[u8], field: &'static str) -> Result<Option<DeviceId>, FieldError> {
    optional(bytes, field)
}

/// An idempotency key: 16 bytes, or empty for none.
pub fn message_id(bytes: &[u8], field: &'static str) -> Result<Option<MessageId>, FieldError> {
    optional(bytes, field)
}

/// A user name of this server, made canonical.
pub fn username(raw: &str, field: &'static str) -> Result<Username, FieldError> {
    Username::parse(raw).map_err(|reason| FieldError::new(field, reason))
}

/// Exactly `N` bytes of no further type: a signature, a hash.
pub fn exact<const N: usize>(bytes: &[u8], field: &'static str) -> Result<[u8; N], FieldError> {
    bytes
        .try_into()
        .map_err(|_| FieldError::new(field, WrongLength { expected: N, actual: bytes.len() }))
}

/// Exactly `N` bytes, or empty for none.
pub fn optional_exact<const N: usize>(
    bytes: &[u8],
    field: &'static str,
) -> Result<Option<[u8; N]>, FieldError> {
    if bytes.is_empty() { Ok(None) } else { exact(bytes, field).map(Some) }
}

/// How many to answer at most; `None` for as many as fit.
pub fn limit(limit: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(limit)
}

/// Refuses a list of more than `max`.
pub fn at_most(len: usize, max: usize, field: &'static str) -> Result<(), FieldError> {
    if len > max { Err(FieldError::new(field, FieldReason::TooMany { max })) } else { Ok(()) }
}

fn parse<'a, T>(bytes: &'a [u8], field: &'static str) -> Result<T, FieldError>
where
    T: TryFrom<&'a [u8], Error = WrongLength>,
{
    T::try_from(bytes).map_err(|reason| FieldError::new(field, reason))
}

fn optional<'a, T>(bytes: &'a [u8], field: &'static str) -> Result<Option<T>, FieldError>
where
    T: TryFrom<&'a [u8], Error = WrongLength>,
{
    if bytes.is_empty() { Ok(None) } else { parse(bytes, field).map(Some) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(expected: usize, actual: usize) -> FieldReason {
        FieldReason::Length(WrongLength { expected, actual })
    }

    #[test]
    fn a_refusal_names_the_field_and_the_reason() {
        let refused = identity_key(&[7; 31], "recipient_key").expect_err("too short");
        assert_eq!(refused, FieldError { field: "recipient_key", reason: length(32, 31) });
        assert_eq!(refused.to_string(), "recipient_key: expected 32 bytes, got 31");
        let refused = username("a@b", "username").expect_err("no name has an @");
        assert_eq!(refused, FieldError::new("username", InvalidUsername::Forbidden));
    }

    #[test]
    fn empty_means_absent_only_where_it_may() {
        assert_eq!(device_id(&[], "f"), Ok(None));
        assert_eq!(message_id(&[], "f"), Ok(None));
        assert_eq!(optional_identity_key(&[], "f"), Ok(None));
        assert_eq!(optional_exact::<64>(&[], "f"), Ok(None));
        assert_eq!(channel_id(&[], "f"), Ok(ChannelId::DEFAULT));
        assert_eq!(identity_key(&[], "f"), Err(FieldError::new("f", length(32, 0))));
        assert_eq!(exact::<64>(&[], "f"), Err(FieldError::new("f", length(64, 0))));
    }

    #[test]
    fn whatever_is_there_has_its_exact_length() {
        assert_eq!(device_id(&[7; 16], "f"), Ok(Some(DeviceId::new([7; 16]))));
        assert_eq!(message_id(&[7; 16], "f"), Ok(Some(MessageId::new([7; 16]))));
        assert_eq!(channel_id(&[7; 16], "f"), Ok(ChannelId::new([7; 16])));
        assert_eq!(optional_identity_key(&[7; 32], "f"), Ok(Some(IdentityKey::new([7; 32]))));
        assert_eq!(optional_exact(&[7; 64], "f"), Ok(Some([7; 64])));
        for len in [1, 15, 17, 32] {
            let bytes = vec![0; len];
            assert_eq!(device_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
            assert_eq!(message_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
            assert_eq!(channel_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
        }
    }

    #[test]
    fn a_list_is_refused_for_its_length_or_for_one_of_its_keys() {
        assert_eq!(
            identity_keys(&vec![[1; 32]; MAX_BATCH], "f").map(|keys| keys.len()),
            Ok(MAX_BATCH)
        );
        assert_eq!(
            identity_keys(&vec![[1; 32]; MAX_BATCH + 1], "f"),
            Err(FieldError::new("f", FieldReason::TooMany { max: MAX_BATCH })),
        );
        let keys: [&[u8]; 2] = [&[1; 32], &[1; 33]];
        assert_eq!(identity_keys(&keys, "f"), Err(FieldError::new("f", length(32, 33))));
    }
}
