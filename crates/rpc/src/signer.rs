//! The key that signs delivery proofs. Health publishes the public key.

use std::fmt;

use aws_lc_rs::signature::Ed25519KeyPair;
use ed25519_dalek::SigningKey;
use qpq_domain::{IdentityKey, UnixMillis};
use qpq_ports::Receipt;
use qpq_proto::{
    delivery_proof::{self, server_key_id},
    v1::DeliveryProof,
};
use rand::{CryptoRng, RngCore};
use zeroize::Zeroizing;

/// An Ed25519 key pair (RFC 8032) with its id.
pub struct DeliverySigner {
    key: SigningKey,
    /// The same key in aws-lc-rs, which signs more than twice as fast. Each accepted message needs
    /// a signature.
    signing: Ed25519KeyPair,
    public: [u8; 32],
    id: [u8; 8],
}

impl fmt::Debug for DeliverySigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeliverySigner(redacted)")
    }
}

impl DeliverySigner {
    /// Generates a key.
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self::from_key(SigningKey::generate(rng))
    }

    /// Creates the signer from its [`DeliverySigner::secret`].
    pub fn from_secret(secret: &[u8; 32]) -> Self {
        Self::from_key(SigningKey::from_bytes(secret))
    }

    fn from_key(key: SigningKey) -> Self {
        let public = key.verifying_key().to_bytes();
        let signing = Ed25519KeyPair::from_seed_and_public_key(key.as_bytes(), &public)
            .expect("a key and its own public key");
        Self { key, signing, public, id: server_key_id(&public) }
    }

    /// Returns the secret key, to be stored readable by the server's user alone.
    pub fn secret(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }

    /// Returns the public key, which is part of the answer to Health.
    pub const fn public_key(&self) -> &[u8; 32] {
        &self.public
    }

    /// Returns the key's id in proofs: the first 8 bytes of SHA-256 of the public key.
    pub const fn key_id(&self) -> &[u8; 8] {
        &self.id
    }

    /// Returns the signed statement that `recipient`'s inbox accepted the message of `receipt`.
    /// Equal receipts have equal proofs.
    pub fn prove(&self, recipient: &IdentityKey, receipt: &Receipt) -> DeliveryProof {
        let UnixMillis(enqueued_at) = receipt.enqueued_at;
        let mut proof = DeliveryProof {
            version: delivery_proof::VERSION,
            server_key_id: self.id.to_vec().into(),
            recipient_key: recipient.as_bytes().to_vec().into(),
            channel_id: receipt.channel.as_bytes().to_vec().into(),
            seq: receipt.seq.0,
            payload_sha256: receipt.payload_sha256.to_vec().into(),
            enqueued_at,
            signature: bytes::Bytes::new(),
        };
        let signature = self.signing.sign(&delivery_proof::signed_bytes(&proof));
        proof.signature = signature.as_ref().to_vec().into();
        proof
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::{ChannelId, Seq};

    use super::*;

    #[test]
    fn a_proof_verifies_with_the_public_key_and_is_deterministic() {
        let signer = DeliverySigner::from_secret(&[5; 32]);
        let receipt = Receipt {
            seq: Seq(7),
            channel: ChannelId::new([1; 16]),
            payload_sha256: [2; 32],
            enqueued_at: UnixMillis(9),
        };
        let recipient = IdentityKey::new([3; 32]);
        let proof = signer.prove(&recipient, &receipt);
        let signature: [u8; 64] = proof.signature.as_ref().try_into().expect("64 bytes");
        IdentityKey::new(*signer.public_key())
            .verify(&delivery_proof::signed_bytes(&proof), &signature)
            .expect("the server's own signature");
        assert_eq!(proof.server_key_id.as_ref(), signer.key_id());
        assert_eq!(
            DeliverySigner::from_secret(&signer.secret()).prove(&recipient, &receipt),
            proof
        );
        assert_ne!(
            signer.prove(&recipient, &Receipt { seq: Seq(8), ..receipt }).signature,
            proof.signature
        );
    }

    #[test]
    fn both_providers_create_equal_signatures() {
        use ed25519_dalek::Signer as _;
        for seed in 0..=u8::MAX {
            let signer = DeliverySigner::from_secret(&[seed; 32]);
            let message = vec![seed; seed.into()];
            assert_eq!(
                signer.signing.sign(&message).as_ref(),
                signer.key.sign(&message).to_bytes()
            );
        }
    }

    #[test]
    fn debug_output_redacts_the_secret() {
        let signer = DeliverySigner::from_secret(&[0xab; 32]);
        assert_eq!(format!("{signer:?}"), "DeliverySigner(redacted)");
    }
}
