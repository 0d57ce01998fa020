//! What a chat message says, and its bytes inside an MLS application message: one version byte,
//! then protobuf.

use std::fmt;

use prost::Message as _;

/// The only version so far. A message of another is left to newer clients.
const VERSION: u8 = 1;

/// One chat message.
#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    /// The sender's own id for the message, unique among its messages.
    pub id: [u8; 16],
    /// When it was sent by the sender's clock, in Unix milliseconds: a claim.
    pub sent_at: u64,
    pub text: String,
}

impl fmt::Debug for Content {
    /// All but what was said: that is between the members.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Content")
            .field("id", &self.id)
            .field("sent_at", &self.sent_at)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(uint64, tag = "2")]
    sent_at: u64,
    #[prost(bytes = "vec", tag = "3")]
    id: Vec<u8>,
}

impl Content {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let encoded =
            Encoded { text: self.text.clone(), sent_at: self.sent_at, id: self.id.to_vec() };
        let mut bytes = vec![VERSION];
        encoded.encode(&mut bytes).expect("a Vec grows as needed");
        bytes
    }

    /// `None` when the bytes are no message of a version known here. Unknown fields are ignored.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&VERSION, protobuf) = bytes.split_first()? else { return None };
        let encoded = Encoded::decode(protobuf).ok()?;
        Some(Self { id: encoded.id.try_into().ok()?, sent_at: encoded.sent_at, text: encoded.text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        Content { id: [7; 16], sent_at: 1_700_000_000_000, text: "hallo, wëlt".into() }
    }

    #[test]
    fn what_is_encoded_decodes() {
        assert_eq!(Content::decode(&content().encode()), Some(content()));
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_versions_are_not_read() {
        let mut longer = content().encode();
        longer.extend_from_slice(&[0xfa, 0x06, 0x02, b'h', b'i']); // field 111, two bytes
        assert_eq!(Content::decode(&longer), Some(content()));
        let mut newer = content().encode();
        newer[0] = 2;
        assert_eq!(Content::decode(&newer), None);
        assert_eq!(Content::decode(&[]), None);
    }

    #[test]
    fn an_id_has_sixteen_bytes() {
        let encoded = Encoded { text: String::new(), sent_at: 0, id: vec![1; 15] };
        let bytes = [&[VERSION][..], &encoded.encode_to_vec()].concat();
        assert_eq!(Content::decode(&bytes), None);
    }
}
