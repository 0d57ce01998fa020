//! Parsers from fields of requests to domain types. An error names the refused field and the
//! reason. Handlers call these parsers first and do not check the results again.

use std::num::NonZeroU32;

use qpq_domain::{
    BlobId, ChannelId, DeviceId, GroupId, IdentityKey, MAX_BATCH, MessageId, WrongLength,
};

/// The refusal of a request field. The field's name is returned to the client, the reason is
/// logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// The field's name in the `.proto` file.
    pub field: &'static str,
    /// The reason for the refusal.
    pub reason: FieldReason,
}

/// The reason why a field was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FieldReason {
    /// The value has the wrong length.
    #[error(transparent)]
    Length(#[from] WrongLength),
    /// The list is too long.
    #[error("at most {max} are allowed")]
    TooMany {
        /// The maximum length.
        max: usize,
    },
    /// The text or the bytes are too long.
    #[error("at most {max} bytes are allowed")]
    TooLong {
        /// The maximum length in bytes.
        max: usize,
    },
    /// The field must not be set together with another one, or is required.
    #[error("not allowed in this combination")]
    Combination,
}

impl FieldError {
    /// Creates the refusal of `field`.
    pub fn new(field: &'static str, reason: impl Into<FieldReason>) -> Self {
        Self { field, reason: reason.into() }
    }
}

/// Parses an identity key: exactly 32 bytes.
pub fn identity_key(bytes: &[u8], field: &'static str) -> Result<IdentityKey, FieldError> {
    parse(bytes, field)
}

/// Parses an optional identity key: 32 bytes, or empty for `None`.
pub fn optional_identity_key(
    bytes: &[u8],
    field: &'static str,
) -> Result<Option<IdentityKey>, FieldError> {
    optional(bytes, field)
}

/// Parses a list of at most [`MAX_BATCH`] identity keys.
pub fn identity_keys<B: AsRef<[u8]>>(
    keys: &[B],
    field: &'static str,
) -> Result<Vec<IdentityKey>, FieldError> {
    at_most(keys.len(), MAX_BATCH, field)?;
    keys.iter().map(|key| identity_key(key.as_ref(), field)).collect()
}

/// Parses a channel id: 16 bytes, or empty for the default channel.
pub fn channel_id(bytes: &[u8], field: &'static str) -> Result<ChannelId, FieldError> {
    parse(bytes, field)
}

/// Parses a device id: 16 bytes, or empty for `None`, the session's device.
pub fn device_id(bytes: &[u8], field: &'static str) -> Result<Option<DeviceId>, FieldError> {
    optional(bytes, field)
}

/// Parses the id of a device that the request is about: exactly 16 bytes.
pub fn required_device_id(bytes: &[u8], field: &'static str) -> Result<DeviceId, FieldError> {
    parse(bytes, field)
}

/// Parses the id of a group: exactly 16 bytes.
pub fn group_id(bytes: &[u8], field: &'static str) -> Result<GroupId, FieldError> {
    parse(bytes, field)
}

/// Parses the id of a blob: exactly 32 bytes.
pub fn blob_id(bytes: &[u8], field: &'static str) -> Result<BlobId, FieldError> {
    parse(bytes, field)
}

/// Parses a message id, the idempotency key of a message: 16 bytes, or empty for `None`.
pub fn message_id(bytes: &[u8], field: &'static str) -> Result<Option<MessageId>, FieldError> {
    optional(bytes, field)
}

/// Parses a maximum number of results: `None` for 0, which means as many as fit.
pub fn limit(limit: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(limit)
}

/// Refuses a list with more than `max` entries.
pub fn at_most(len: usize, max: usize, field: &'static str) -> Result<(), FieldError> {
    if len > max { Err(FieldError::new(field, FieldReason::TooMany { max })) } else { Ok(()) }
}

/// Refuses a text or bytes longer than `max` bytes.
pub fn no_longer_than(
    bytes: impl AsRef<[u8]>,
    max: usize,
    field: &'static str,
) -> Result<(), FieldError> {
    if bytes.as_ref().len() > max {
        return Err(FieldError::new(field, FieldReason::TooLong { max }));
    }
    Ok(())
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
    fn a_refused_field_is_reported_with_name_and_reason() {
        let refused = identity_key(&[7; 31], "recipient_key").expect_err("too short");
        assert_eq!(refused, FieldError { field: "recipient_key", reason: length(32, 31) });
        assert_eq!(refused.to_string(), "recipient_key: expected 32 bytes, got 31");
    }

    #[test]
    fn only_optional_fields_may_be_empty() {
        assert_eq!(device_id(&[], "f"), Ok(None));
        assert_eq!(message_id(&[], "f"), Ok(None));
        assert_eq!(optional_identity_key(&[], "f"), Ok(None));
        assert_eq!(channel_id(&[], "f"), Ok(ChannelId::DEFAULT));
        assert_eq!(identity_key(&[], "f"), Err(FieldError::new("f", length(32, 0))));
    }

    #[test]
    fn a_field_of_the_wrong_length_is_refused() {
        assert_eq!(device_id(&[7; 16], "f"), Ok(Some(DeviceId::new([7; 16]))));
        assert_eq!(message_id(&[7; 16], "f"), Ok(Some(MessageId::new([7; 16]))));
        assert_eq!(channel_id(&[7; 16], "f"), Ok(ChannelId::new([7; 16])));
        assert_eq!(group_id(&[7; 16], "f"), Ok(GroupId::new([7; 16])));
        assert_eq!(required_device_id(&[7; 16], "f"), Ok(DeviceId::new([7; 16])));
        assert_eq!(no_longer_than("four", 4, "f"), Ok(()));
        let too_long = FieldReason::TooLong { max: 3 };
        assert_eq!(no_longer_than("four", 3, "f"), Err(FieldError::new("f", too_long)));
        assert_eq!(optional_identity_key(&[7; 32], "f"), Ok(Some(IdentityKey::new([7; 32]))));
        for len in [0, 1, 15, 17, 32] {
            let bytes = vec![0; len];
            assert_eq!(group_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
            let refused = required_device_id(&bytes, "f");
            assert_eq!(refused, Err(FieldError::new("f", length(16, len))));
            if len == 0 {
                continue;
            }
            assert_eq!(device_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
            assert_eq!(message_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
            assert_eq!(channel_id(&bytes, "f"), Err(FieldError::new("f", length(16, len))));
        }
    }

    #[test]
    fn a_list_that_is_too_long_or_has_an_invalid_key_is_refused() {
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
