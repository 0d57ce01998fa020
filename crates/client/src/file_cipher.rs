//! The encryption of files: a fresh key for each file, and segments that are verified one by one.
//!
//! A file is cut into segments of 64 KiB. The last one is shorter, and empty only if the file is.
//! Each is sealed with ChaCha20-Poly1305 (RFC 8439) and followed by its tag of 16 bytes. The nonce
//! is that of STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015): 7 zero bytes, the number of the
//! segment in 4 bytes, big-endian, and 1 for the last segment, else 0. So segments cannot be
//! reordered, repeated or cut off. Zero bytes suffice as the prefix, because no key is used for two
//! files.

use chacha20poly1305::{
    AeadInPlace as _, ChaCha20Poly1305, KeyInit as _,
    aead::{Error, generic_array::GenericArray},
};

/// The bytes of a segment.
const SEGMENT: usize = 64 << 10;
/// The bytes of a tag.
const TAG: usize = 16;
/// The bytes of a sealed segment.
pub(crate) const SEALED_SEGMENT: usize = SEGMENT + TAG;

/// Returns the size of a file of `size` bytes after its encryption; `None` if the size is beyond
/// the range of numbers.
pub(crate) const fn sealed_size(size: u64) -> Option<u64> {
    let segments = size.div_ceil(SEGMENT as u64);
    let segments = if segments == 0 { 1 } else { segments };
    match segments.checked_mul(TAG as u64) {
        Some(tags) => size.checked_add(tags),
        None => None,
    }
}

/// Encrypts a file.
pub(crate) fn seal(key: &[u8; 32], content: &[u8]) -> Vec<u8> {
    let cipher = ChaCha20Poly1305::new(key.into());
    let mut sealed = Vec::with_capacity(content.len() + content.len() / SEGMENT * TAG + TAG);
    let mut segments = content.chunks(SEGMENT).peekable();
    let mut number = 0;
    loop {
        let begin = sealed.len();
        sealed.extend_from_slice(segments.next().unwrap_or_default());
        let is_last = segments.peek().is_none();
        let nonce = nonce(number, is_last);
        let tag = cipher
            .encrypt_in_place_detached(GenericArray::from_slice(&nonce), &[], &mut sealed[begin..])
            .expect("a segment is short");
        sealed.extend_from_slice(&tag);
        if is_last {
            return sealed;
        }
        number += 1;
    }
}

/// Decrypts a file, segment by segment.
pub(crate) struct Opener {
    cipher: ChaCha20Poly1305,
    number: u32,
}

impl Opener {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        Self { cipher: ChaCha20Poly1305::new(key.into()), number: 0 }
    }

    /// Decrypts the next segment, and appends it to `content`.
    pub(crate) fn open(
        &mut self,
        sealed: &[u8],
        is_last: bool,
        content: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let (bytes, tag) = sealed.split_last_chunk::<TAG>().ok_or(Error)?;
        let (begin, nonce) = (content.len(), nonce(self.number, is_last));
        content.extend_from_slice(bytes);
        let opened = self.cipher.decrypt_in_place_detached(
            GenericArray::from_slice(&nonce),
            &[],
            &mut content[begin..],
            GenericArray::from_slice(tag),
        );
        if opened.is_err() {
            content.truncate(begin);
        }
        self.number += 1;
        opened
    }
}

fn nonce(number: u32, is_last: bool) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[7..11].copy_from_slice(&number.to_be_bytes());
    nonce[11] = u8::from(is_last);
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn open(sealed: &[u8]) -> Result<Vec<u8>, Error> {
        let (mut opener, mut content) = (Opener::new(&KEY), Vec::new());
        let mut segments = sealed.chunks(SEALED_SEGMENT).peekable();
        while let Some(segment) = segments.next() {
            opener.open(segment, segments.peek().is_none(), &mut content)?;
        }
        Ok(content)
    }

    #[test]
    fn files_of_any_size_are_opened_as_they_were_sealed() {
        for size in [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 200_000] {
            let content: Vec<u8> = (0..size).map(|n| n as u8).collect();
            let sealed = seal(&KEY, &content);
            assert_eq!(Some(sealed.len() as u64), sealed_size(size as u64), "{size}");
            assert_eq!(open(&sealed), Ok(content), "{size}");
        }
        assert_eq!(sealed_size(u64::MAX), None);
    }

    #[test]
    fn changed_reordered_and_cut_files_are_refused() {
        let sealed = seal(&KEY, &[1; 3 * SEGMENT]);
        for place in [0, SEALED_SEGMENT - 1, 2 * SEALED_SEGMENT, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[place] ^= 1;
            assert!(open(&changed).is_err(), "{place}");
        }
        let (one, rest) = sealed.split_at(SEALED_SEGMENT);
        let (two, three) = rest.split_at(SEALED_SEGMENT);
        for wrong in [vec![two, one, three], vec![one, two], vec![one, one, two, three]] {
            assert!(open(&wrong.concat()).is_err());
        }
        assert!(open(&sealed[..sealed.len() - 1]).is_err());
        assert!(open(&[0; 15]).is_err());
    }

    #[test]
    fn the_first_and_the_last_segment_have_the_documented_nonces() {
        assert_eq!(nonce(0, false), [0; 12]);
        assert_eq!(nonce(0x0102_0304, true), [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 1]);
    }
}
