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
    /// The file that the message is about. The text may be empty then.
    pub file: Option<SharedFile>,
}

/// A file that was uploaded as an encrypted blob. All of it is a claim of the sender.
#[derive(Clone, PartialEq, Eq)]
pub struct SharedFile {
    /// The name, without directories.
    pub name: String,
    /// The size in bytes.
    pub size: u64,
    /// The MIME type; may be empty.
    pub mime: String,
    /// The id of the blob: the SHA-256 of the encrypted file.
    pub blob: [u8; 32],
    /// The key that the file is encrypted with.
    pub key: [u8; 32],
    /// The width and the height in pixels, if the file is a picture.
    pub picture: Option<(u32, u32)>,
}

impl SharedFile {
    /// The maximum length of a name, in bytes.
    pub const MAX_NAME: usize = 255;
    /// The maximum length of a MIME type, in bytes.
    pub const MAX_MIME: usize = 128;

    /// Encodes the file as in a message.
    pub fn encode(&self) -> Vec<u8> {
        EncodedFile::from(self).encode_to_vec()
    }

    /// Decodes a file; `None` if the bytes are not a file. Unknown fields are ignored.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        EncodedFile::decode(bytes).ok()?.into_file()
    }
}

impl fmt::Debug for SharedFile {
    /// Omits the name and the key, which must not appear in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedFile").field("size", &self.size).finish_non_exhaustive()
    }
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
    #[prost(message, optional, tag = "5")]
    file: Option<EncodedFile>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct EncodedFile {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(string, tag = "3")]
    mime: String,
    #[prost(bytes = "vec", tag = "4")]
    blob: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    key: Vec<u8>,
    #[prost(uint32, tag = "6")]
    width: u32,
    #[prost(uint32, tag = "7")]
    height: u32,
}

impl From<&SharedFile> for EncodedFile {
    fn from(file: &SharedFile) -> Self {
        let (width, height) = file.picture.unwrap_or_default();
        Self {
            name: file.name.clone(),
            size: file.size,
            mime: file.mime.clone(),
            blob: file.blob.to_vec(),
            key: file.key.to_vec(),
            width,
            height,
        }
    }
}

impl EncodedFile {
    fn into_file(self) -> Option<SharedFile> {
        let (width, height) = (self.width, self.height);
        Some(SharedFile {
            name: self.name,
            size: self.size,
            mime: self.mime,
            blob: self.blob.try_into().ok()?,
            key: self.key.try_into().ok()?,
            picture: (width > 0 && height > 0).then_some((width, height)),
        })
    }
}

impl Content {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let encoded = Encoded {
            text: self.text.clone(),
            sent_at: self.sent_at,
            id: self.id.to_vec(),
            repeats: self.repeats.map(|digest| digest.to_vec()),
            file: self.file.as_ref().map(EncodedFile::from),
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
        let file = match encoded.file {
            Some(file) => Some(file.into_file()?),
            None => None,
        };
        Some(Self {
            id: encoded.id.try_into().ok()?,
            sent_at: encoded.sent_at,
            text: encoded.text,
            repeats,
            file,
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
            file: None,
        }
    }

    fn file() -> SharedFile {
        SharedFile {
            name: "photo.jpg".into(),
            size: 1_300_000,
            mime: "image/jpeg".into(),
            blob: [1; 32],
            key: [2; 32],
            picture: Some((640, 480)),
        }
    }

    #[test]
    fn a_file_is_decoded_as_it_was_encoded_and_a_malformed_one_is_refused() {
        for picture in [None, Some((640, 480))] {
            let file = SharedFile { picture, ..file() };
            assert_eq!(SharedFile::decode(&file.encode()), Some(file.clone()));
            let content = Content { file: Some(file), ..content() };
            assert_eq!(Content::decode(&content.encode()), Some(content));
        }
        let short = EncodedFile { key: vec![2; 31], ..EncodedFile::from(&file()) };
        assert_eq!(SharedFile::decode(&short.encode_to_vec()), None);
        let shown = format!("{:?}", file());
        assert_eq!(shown, "SharedFile { size: 1300000, .. }");
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
        let encoded = Encoded { id: vec![1; 15], ..Encoded::default() };
        let bytes = [&[VERSION][..], &encoded.encode_to_vec()].concat();
        assert_eq!(Content::decode(&bytes), None);
    }
}
