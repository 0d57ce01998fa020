//! The unencrypted parts of MLS messages (RFC 9420 §6.3).
//!
//! Clients name themselves in the authenticated data of a private message. Until the message is
//! decrypted, the name is a mere claim for the receiver. If decryption fails, the receiver asks the
//! named account to repeat the message. The server knows the sender of each message anyway.

use qpq_domain::IdentityKey;

/// The version of our clients' authenticated data.
const VERSION: u8 = 1;

/// `mls10` and `mls_private_message` (RFC 9420 §6 and §17.2).
const PRIVATE_MESSAGE: [u8; 4] = [0, 1, 0, 2];

/// Returns the authenticated data of a message of `me`.
pub(crate) fn claim(me: &IdentityKey) -> Vec<u8> {
    [&[VERSION][..], me.as_bytes()].concat()
}

/// Returns the sender that a private message names, without a proof.
pub(crate) fn claimed_sender(bytes: &[u8]) -> Option<IdentityKey> {
    let mut rest = bytes.strip_prefix(&PRIVATE_MESSAGE)?;
    vector(&mut rest)?; // group_id
    rest = rest.get(8 + 1..)?; // epoch, content_type
    let (&VERSION, key) = vector(&mut rest)?.split_first()? else { return None };
    IdentityKey::try_from(key).ok()
}

/// Returns the leaf index of the author of a GroupInfo (RFC 9420 §12.4.3). The index precedes the
/// signature at the end: 64 bytes of Ed25519 after 2 bytes of length.
pub(crate) fn author_of_group_info(bytes: &[u8]) -> Option<u32> {
    let (rest, signature) = bytes.split_at_checked(bytes.len().checked_sub(66)?)?;
    let author = rest.get(rest.len().checked_sub(4)?..)?;
    let has_length = signature.starts_with(&[0x40, 0x40]);
    has_length.then(|| u32::from_be_bytes(author.try_into().expect("four bytes")))
}

/// Removes and returns the vector at the front of `rest` (RFC 9420 §2.1.2).
fn vector<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let first = *rest.first()?;
    let len_len = match first >> 6 {
        0 => 1,
        1 => 2,
        2 => 4,
        _ => return None,
    };
    let (head, tail) = rest.split_at_checked(len_len)?;
    let len = head.iter().fold(0_usize, |len, byte| len << 8 | usize::from(*byte));
    let mask = (1_usize << (8 * len_len - 2)) - 1;
    let (content, tail) = tail.split_at_checked(len & mask)?;
    *rest = tail;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_private_message_with_our_data_names_a_sender() {
        let me = IdentityKey::new([7; 32]);
        let mut message = PRIVATE_MESSAGE.to_vec();
        message.extend([2, b'i', b'd']);
        message.extend([0; 9]);
        message.push(33);
        message.extend(claim(&me));
        assert_eq!(claimed_sender(&message), Some(me));
        for len in 0..message.len() {
            assert_eq!(claimed_sender(&message[..len]), None);
        }
        message[17] = 2;
        assert_eq!(claimed_sender(&message), None, "a later version");
        assert_eq!(claimed_sender(b"rubbish"), None);
    }
}
