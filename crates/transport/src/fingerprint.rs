//! The fingerprint by which people and clients identify a server: the hash of its public key, which
//! stays the same when the certificate is renewed.
//!
//! Releases up to 0.1 used the hash of the whole certificate. The two kinds look the same, so a
//! pinned fingerprint is compared with both hashes.

use std::{fmt, str::FromStr};

use rustls::{pki_types::CertificateDer, server::ParsedCertificate};
use sha2::{Digest, Sha256};

/// SHA-256 of a leaf certificate's public key (its `SubjectPublicKeyInfo`, in DER); 64 hexadecimal
/// digits as text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

/// The error for a text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint has 64 hexadecimal digits")]
pub struct ParseFingerprintError;

impl Fingerprint {
    /// Returns the fingerprint of the public key of a certificate in DER, or `None` if the
    /// certificate is malformed.
    #[must_use]
    pub fn of_key(certificate: &[u8]) -> Option<Self> {
        let certificate = CertificateDer::from(certificate);
        let parsed = ParsedCertificate::try_from(&certificate).ok()?;
        Some(Self(Sha256::digest(parsed.subject_public_key_info()).into()))
    }

    /// Returns the hash of a whole certificate in DER, which earlier releases pinned.
    #[must_use]
    pub fn of_certificate(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }

    /// Returns the hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Fingerprint {
    fn from(hash: [u8; 32]) -> Self {
        Self(hash)
    }
}

impl FromStr for Fingerprint {
    type Err = ParseFingerprintError;

    /// Parses the output of [`Display`](fmt::Display), also with the colons that other tools write
    /// between the bytes.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut hash = [0; 32];
        hex::decode_to_slice(text.replace(':', ""), &mut hash)
            .map_err(|_| ParseFingerprintError)?;
        Ok(Self(hash))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same as `openssl x509 -pubkey -noout | openssl pkey -pubin -outform DER | sha256sum`.
    #[test]
    fn a_fingerprint_is_the_hash_of_the_subject_public_key_info() {
        use rcgen::PublicKeyData as _;
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["example.org".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let expected: [u8; 32] = Sha256::digest(key.subject_public_key_info()).into();
        assert_eq!(Fingerprint::of_key(certificate.der()), Some(Fingerprint(expected)));
        assert_eq!(Fingerprint::of_key(&certificate.der()[1..]), None);
    }

    #[test]
    fn a_displayed_fingerprint_parses_to_itself() {
        let fingerprint = Fingerprint::of_certificate(b"");
        let text = fingerprint.to_string();
        assert_eq!(text, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(text.parse(), Ok(fingerprint));
        let colons: Vec<String> = text
            .to_uppercase()
            .as_bytes()
            .chunks(2)
            .map(|b| String::from_utf8_lossy(b).into())
            .collect();
        assert_eq!(colons.join(":").parse(), Ok(fingerprint));
        assert_eq!(text[2..].parse::<Fingerprint>(), Err(ParseFingerprintError));
    }
}
