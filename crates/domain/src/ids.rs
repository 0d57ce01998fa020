//! Identifiers that are nothing but bytes or a number. Each has its own type, so that none can
//! stand in for another.

use std::fmt;

/// A byte string had another length than its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} bytes, got {actual}")]
pub struct WrongLength {
    pub expected: usize,
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
            pub const LEN: usize = 16;

            pub const fn new(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

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
    /// One of an account's devices, chosen by the client.
    DeviceId
}
id16! {
    /// A sender's idempotency key for one message to one recipient (a UUIDv7 by convention).
    MessageId
}

id16! {
    /// The history that seqs belong to. Seqs of two histories cannot be compared.
    ///
    /// A store that was restored, or whose standby was promoted, begins another history: seqs that
    /// were in use before may be assigned again, to other messages.
    StoreId
}

/// Which of an inbox's channels a message belongs to: the default one, or one named by 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ChannelId(Option<[u8; 16]>);

impl ChannelId {
    /// The channel of a message that names none.
    pub const DEFAULT: Self = Self(None);

    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(Some(bytes))
    }

    /// The wire form: empty for the default channel, else 16 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |b| b.as_slice())
    }
}

impl TryFrom<&[u8]> for ChannelId {
    type Error = WrongLength;

    /// Empty is the default channel; everything else must be 16 bytes.
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

/// An account's number inside one deployment. It never goes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccountId(pub i64);

/// A message's place in its inbox: 1 for the first, rising by exactly one for each message
/// accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

impl Seq {
    /// Before the first message.
    pub const ZERO: Self = Self(0);

    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_empty_or_sixteen_bytes() {
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
    fn ids_show_themselves_in_hexadecimal() {
        assert_eq!(DeviceId::new([0xab; 16]).to_string(), "ab".repeat(16));
        assert_eq!(format!("{:?}", ChannelId::DEFAULT), "ChannelId(default)");
    }
}
