//! The content of a chat message, and its encoding inside an MLS application message: one version
//! byte, then protobuf.

use std::fmt;

use prost::Message as _;

/// The version of texts.
const VERSION: u8 = 1;
/// The version of control messages between clients, which are not shown to people. A client without
/// this version ignores them as unknown.
const CONTROL_VERSION: u8 = 2;

/// One chat message.
#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    /// The sender's own id for the message, unique among its messages.
    pub id: [u8; 16],
    /// The time of sending by the sender's clock, in Unix milliseconds: a claim of the sender.
    pub sent_at: u64,
    pub text: String,
    /// SHA-256 of the message that this one repeats, for a receiver that could not read the first.
    pub repeats: Option<[u8; 32]>,
}

/// The content of an application message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MessageContent {
    Text(Content),
    /// The sender could not read these messages, named by the SHA-256 of their bytes.
    CouldNotRead(Vec<[u8; 32]>),
    /// The sender has left the group, and asks the admins to be removed.
    Leaving,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Control {
    #[prost(bytes = "vec", repeated, tag = "1")]
    could_not_read: Vec<Vec<u8>>,
    #[prost(bool, tag = "2")]
    leaving: bool,
}

impl MessageContent {
    /// Decodes a message; `None` if the bytes are not a message of a known version.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&CONTROL_VERSION, protobuf) = bytes.split_first()? else {
            return Content::decode(bytes).map(Self::Text);
        };
        let control = Control::decode(protobuf).ok()?;
        if control.leaving {
            return Some(Self::Leaving);
        }
        let digests: Option<Vec<_>> =
            control.could_not_read.into_iter().map(|digest| digest.try_into().ok()).collect();
        digests.filter(|digests| !digests.is_empty()).map(Self::CouldNotRead)
    }
}

/// Encodes a [`MessageContent::CouldNotRead`].
pub(crate) fn could_not_read(digests: &[[u8; 32]]) -> Vec<u8> {
    let could_not_read = digests.iter().map(|one| one.to_vec()).collect();
    encode(&Control { could_not_read, ..Control::default() })
}

/// Encodes a [`MessageContent::Leaving`].
pub(crate) fn leaving() -> Vec<u8> {
    encode(&Control { leaving: true, ..Control::default() })
}

fn encode(control: &Control) -> Vec<u8> {
    let mut bytes = vec![CONTROL_VERSION];
    control.encode(&mut bytes).expect("a Vec grows as needed");
    bytes
}

impl fmt::Debug for Content {
    /// Omits the text, which must not appear in logs.
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
    #[prost(bytes = "vec", optional, tag = "4")]
    repeats: Option<Vec<u8>>,
}

impl Content {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let encoded = Encoded {
            text: self.text.clone(),
            sent_at: self.sent_at,
            id: self.id.to_vec(),
            repeats: self.repeats.map(|digest| digest.to_vec()),
        };
        let mut bytes = vec![VERSION];
        encoded.encode(&mut bytes).expect("a Vec grows as needed");
        bytes
    }

    /// Decodes a text; `None` if the bytes are not a text of a known version. Unknown fields
    /// are ignored.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&VERSION, protobuf) = bytes.split_first()? else { return None };
        let encoded = Encoded::decode(protobuf).ok()?;
        let repeats = encoded.repeats.map(|digest| digest.try_into()).transpose().ok()?;
        Some(Self {
            id: encoded.id.try_into().ok()?,
            sent_at: encoded.sent_at,
            text: encoded.text,
            repeats,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        Content {
            id: [7; 16],
            sent_at: 1_700_000_000_000,
            text: "hallo, wëlt".into(),
            repeats: Some([9; 32]),
        }
    }

    #[test]
    fn encoded_contents_decode_to_the_same_contents() {
        assert_eq!(
            MessageContent::decode(&content().encode()),
            Some(MessageContent::Text(content()))
        );
        let question = could_not_read(&[[1; 32], [2; 32]]);
        assert_eq!(
            MessageContent::decode(&question),
            Some(MessageContent::CouldNotRead(vec![[1; 32], [2; 32]]))
        );
        assert_eq!(MessageContent::decode(&could_not_read(&[])), None);
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_versions_are_not_read() {
        let mut longer = content().encode();
        longer.extend_from_slice(&[0xfa, 0x06, 0x02, b'h', b'i']); // field 111, two bytes
        assert_eq!(Content::decode(&longer), Some(content()));
        let mut newer = content().encode();
        newer[0] = 3;
        assert_eq!(MessageContent::decode(&newer), None);
        assert_eq!(Content::decode(&[]), None);
    }

    #[test]
    fn content_with_an_id_of_the_wrong_length_is_not_decoded() {
        let encoded = Encoded { text: String::new(), sent_at: 0, id: vec![1; 15], repeats: None };
        let bytes = [&[VERSION][..], &encoded.encode_to_vec()].concat();
        assert_eq!(Content::decode(&bytes), None);
    }
}
