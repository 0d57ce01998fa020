//! The signed bytes of a delivery proof, which is the server's signed statement that it accepted a
//! message. The server signs these bytes, and the client verifies the signature with the key from
//! Health.

use prost::Message;
use sha2::{Digest, Sha256};

use crate::v1::DeliveryProof;

/// The prefix of the signed bytes, so that no signature for another purpose is valid as a proof.
const CONTEXT: &[u8] = b"qpq/delivery/1";

/// The version of the proofs that this module describes.
pub const VERSION: u32 = 1;

/// Returns the bytes that the server signs with Ed25519: `"qpq/delivery/1"` and the serialization
/// of fields 1 to 7 in order. The signature in `proof` is ignored.
pub fn signed_bytes(proof: &DeliveryProof) -> Vec<u8> {
    // Prost writes fields in the order of their numbers and omits default values, which is the
    // canonical form.
    let unsigned = DeliveryProof { signature: Default::default(), ..proof.clone() };
    let mut bytes = CONTEXT.to_vec();
    unsigned.encode(&mut bytes).expect("a Vec grows");
    bytes
}

/// Returns the id of a server key: the first 8 bytes of its SHA-256.
pub fn server_key_id(server_key: &[u8; 32]) -> [u8; 8] {
    let digest = Sha256::digest(server_key);
    *digest.first_chunk().expect("a digest has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof() -> DeliveryProof {
        DeliveryProof {
            version: VERSION,
            server_key_id: vec![0xaa; 8].into(),
            recipient_key: vec![0xbb; 32].into(),
            channel_id: vec![0xcc; 16].into(),
            seq: 300,
            payload_sha256: vec![0xdd; 32].into(),
            enqueued_at: 5,
            signature: vec![0xee; 64].into(),
        }
    }

    #[test]
    fn signed_bytes_have_the_documented_layout() {
        let expected = [
            b"qpq/delivery/1".as_slice(),
            &[0x08, 1],
            &[0x12, 8],
            &[0xaa; 8],
            &[0x1a, 32],
            &[0xbb; 32],
            &[0x22, 16],
            &[0xcc; 16],
            &[0x28, 0xac, 0x02],
            &[0x32, 32],
            &[0xdd; 32],
            &[0x38, 5],
        ]
        .concat();
        assert_eq!(signed_bytes(&proof()), expected);
    }

    #[test]
    fn the_default_channel_is_not_in_the_signed_bytes() {
        let in_default = DeliveryProof { channel_id: Default::default(), ..proof() };
        assert_eq!(signed_bytes(&proof()).len() - signed_bytes(&in_default).len(), 2 + 16);
    }

    #[test]
    fn a_key_id_is_the_start_of_its_digest() {
        // SHA-256 of 32 zero bytes.
        assert_eq!(server_key_id(&[0; 32]), [0x66, 0x68, 0x7a, 0xad, 0xf8, 0x62, 0xbd, 0x77]);
    }
}
