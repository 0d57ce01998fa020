//! Identifiers that consist of bytes or of a number. Each has its own type, so that one cannot be
//! used in place of another.

use std::fmt;

/// The error for a byte string that does not have the length of its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} bytes, got {actual}")]
pub struct WrongLength {
    /// The length of the type, in bytes.
    pub expected: usize,
    /// The length of the byte string.
    pub actual: usize,
}

/// Copies `bytes` into an array of exactly `N` bytes.
pub(crate) fn exact<const N: usize>(bytes: &[u8]) -> Result<[u8; N], WrongLength> {
    bytes.try_into().map_err(|_| WrongLength { expected: N, actual: bytes.len() })
}

/// Writes bytes as lower-case hexadecimal.
pub(crate) fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The length in bytes.
            pub const LEN: usize = 16;

            /// Creates an id from its bytes.
            pub const fn new(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Returns the bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = WrongLength;

            fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
                exact(bytes).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id16! {
    /// The id of a device of an account, chosen by the client.
    DeviceId
}
id16! {
    /// The id of a group: the channel of its messages.
    GroupId
}
id16! {
    /// The sender's idempotency key for one message to one recipient (by convention a UUIDv7).
    MessageId
}

id16! {
    /// The id of the history that seqs belong to. Seqs of two histories cannot be compared.
    ///
    /// A new history begins when a store is restored or its standby is promoted. Seqs that were in
    /// use before may then be assigned again, to other messages.
    StoreId
}

/// The id of a blob: the SHA-256 of its content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId([u8; 32]);

impl BlobId {
    /// Creates an id from its bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the id.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for BlobId {
    type Error = WrongLength;

    fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
        exact(bytes).map(Self)
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobId({self})")
    }
}

/// The channel of an inbox that a message is in: the default channel, or one with a 16-byte id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ChannelId(Option<[u8; 16]>);

impl From<GroupId> for ChannelId {
    fn from(group: GroupId) -> Self {
        Self::new(*group.as_bytes())
    }
}

impl ChannelId {
    /// The channel of messages without a channel id.
    pub const DEFAULT: Self = Self(None);

    /// Creates the id of a channel other than the default one.
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(Some(bytes))
    }

    /// Returns the bytes on the wire: none for the default channel, else 16.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |b| b.as_slice())
    }
}

impl TryFrom<&[u8]> for ChannelId {
    type Error = WrongLength;

    /// Parses the bytes on the wire: none for the default channel, else 16.
    fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
        if bytes.is_empty() { Ok(Self::DEFAULT) } else { exact(bytes).map(|b| Self(Some(b))) }
    }
}

impl fmt::Debug for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChannelId(")?;
        match &self.0 {
            None => f.write_str("default")?,
            Some(bytes) => write_hex(f, bytes)?,
        }
        f.write_str(")")
    }
}

/// The number of an account within one deployment. Never sent on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccountId(pub i64);

/// The position of a message in its inbox: 1 for the first, one more for each accepted message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

impl Seq {
    /// The position before the first message.
    pub const ZERO: Self = Self(0);

    /// Returns the position of the next message.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_ids_of_other_lengths_than_0_and_16_are_refused() {
        assert_eq!(ChannelId::try_from(&[][..]), Ok(ChannelId::DEFAULT));
        assert_eq!(ChannelId::try_from(&[7; 16][..]).expect("16 bytes").as_bytes(), &[7; 16]);
        for len in [1, 15, 17, 32] {
            assert_eq!(
                ChannelId::try_from(&vec![0; len][..]),
                Err(WrongLength { expected: 16, actual: len })
            );
        }
    }

    #[test]
    fn ids_are_displayed_in_hexadecimal() {
        assert_eq!(DeviceId::new([0xab; 16]).to_string(), "ab".repeat(16));
        assert_eq!(format!("{:?}", ChannelId::DEFAULT), "ChannelId(default)");
    }
}
