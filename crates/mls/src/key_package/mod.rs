//! The server's check of a KeyPackage before storing it: well-formed, signed, within its lifetime,
//! and of the account that uploads it.
//!
//! The check depends on the bytes, the policy, the keys of the owner and the given time, and on
//! nothing else.

mod outline;
#[cfg(test)]
mod tests;

use std::{sync::LazyLock, time::Duration};

use openmls::prelude::{
    Ciphersuite, KeyPackage, KeyPackageIn, KeyPackageVerifyError, OpenMlsCrypto as _,
    ProtocolVersion,
};
use openmls_rust_crypto::RustCrypto;
use qpq_domain::UnixMillis;
use sha2::{Digest as _, Sha256};
use tls_codec::DeserializeBytes as _;

use outline::Outline;

/// The maximum lifetime that MLS libraries create and accept: 84 days, and one hour for clocks that
/// are behind.
pub const MAX_LIFETIME: Duration = Duration::from_secs(84 * 24 * 3600 + 3600);

/// The rules by which a server accepts KeyPackages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The ciphersuites (RFC 9420 §17.1, by number) that may be uploaded, whether or not they can
    /// be checked here.
    pub suites: Vec<u16>,
    /// The maximum size of a package, in bytes.
    pub max_bytes: usize,
    /// The maximum time from `not_before` to `not_after`.
    pub max_lifetime: Duration,
}

impl Default for Policy {
    /// The suites that sign with Ed25519, as identity keys are: 1 and 3 (checked), and the
    /// post-quantum hybrids 0x004D to 0x004F, whose numbers are provisional (not checked).
    fn default() -> Self {
        Self {
            suites: vec![0x0001, 0x0003, 0x004D, 0x004E, 0x004F],
            max_bytes: 64 * 1024,
            max_lifetime: MAX_LIFETIME,
        }
    }
}

/// A package that may be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Whether the signatures were verified; `false` where the suite is allowed but unknown to the
    /// crypto library.
    pub verified: bool,
    /// Whether the package says that it may be used more than once (extension 0x000A).
    pub last_resort: bool,
    /// The time from which the package may be issued.
    pub not_before: UnixMillis,
    /// The time from which the package must not be issued.
    pub not_after: UnixMillis,
    /// The key that signs the package; `None` where the suite is unknown to the crypto library.
    pub signature_key: Option<[u8; 32]>,
    /// The KeyPackageRef (RFC 9420 §5.2), computed with SHA-256 for every suite. A package has the
    /// same reference bare and wrapped, and any two packages have different ones.
    pub reference: [u8; 32],
}

/// The reason why a package must not be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    #[error("the key package is larger than the server allows")]
    TooLarge,
    #[error("the bytes are not one MLS key package")]
    Malformed,
    #[error("the key package is not of MLS 1.0")]
    WrongVersion,
    #[error("the server does not accept key packages of this ciphersuite")]
    SuiteNotAllowed,
    #[error("the key package is signed by none of the uploader's keys")]
    ForeignSigner,
    #[error("the key package's lifetime is over")]
    Expired,
    #[error("the key package's lifetime has not begun")]
    NotYetValid,
    #[error("the key package lives longer than the server allows")]
    LifetimeTooLong,
    #[error("a signature in the key package does not verify")]
    BadSignature,
    #[error("the key package contradicts itself")]
    Inconsistent,
}

impl Rejected {
    /// Returns the reason as one stable word, for error codes and metrics.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::WrongVersion => "wrong_version",
            Self::SuiteNotAllowed => "suite_not_allowed",
            Self::ForeignSigner => "foreign_signer",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::LifetimeTooLong => "lifetime_too_long",
            Self::BadSignature => "bad_signature",
            Self::Inconsistent => "inconsistent",
        }
    }
}

/// Checks an uploaded package, bare or inside an MLSMessage, which one of `signers` must have
/// signed. Init keys may have any length.
///
/// # Errors
/// The first reason found. Cheap checks come first.
pub fn check(
    bytes: &[u8],
    policy: &Policy,
    signers: &[[u8; 32]],
    now: UnixMillis,
) -> Result<Checked, Rejected> {
    let checked = inspect(bytes, policy, signers, now)?;
    Ok(Checked { verified: verify_signatures(bytes)?, ..checked })
}

/// Checks a package except its signatures, which take most of the time. Intended for a package that
/// may be known by its reference: its signatures have been verified before.
///
/// # Errors
/// The first reason found.
pub fn inspect(
    bytes: &[u8],
    policy: &Policy,
    signers: &[[u8; 32]],
    now: UnixMillis,
) -> Result<Checked, Rejected> {
    if bytes.len() > policy.max_bytes {
        return Err(Rejected::TooLarge);
    }
    let outline = Outline::read(bytes)?;
    if !policy.suites.contains(&outline.suite) {
        return Err(Rejected::SuiteNotAllowed);
    }
    check_lifetime(&outline, policy, now)?;
    let signature_key = match checkable(outline.suite) {
        Checkable::Yes => {
            let is_signer = |key: &&[u8; 32]| key[..] == *outline.signature_key;
            let key = signers.iter().find(is_signer).ok_or(Rejected::ForeignSigner)?;
            Some(*key)
        }
        Checkable::No => None,
    };
    Ok(Checked {
        verified: false,
        signature_key,
        last_resort: outline.last_resort,
        not_before: UnixMillis(outline.not_before.saturating_mul(1000)),
        not_after: UnixMillis(outline.not_after.saturating_mul(1000)),
        reference: reference(outline.bare),
    })
}

/// Verifies the signatures of a package that [`inspect`] has accepted. Returns `false` if the suite
/// cannot be verified here.
///
/// # Errors
/// A signature that does not verify, or contents that contradict each other.
pub fn verify_signatures(bytes: &[u8]) -> Result<bool, Rejected> {
    let outline = Outline::read(bytes)?;
    match checkable(outline.suite) {
        Checkable::Yes => verify(outline.bare).map(|()| true),
        Checkable::No => Ok(false),
    }
}

/// Verifies a package that `check` has accepted, and returns it for use in a group. openmls also
/// checks its lifetime, by the system's clock.
pub(crate) fn parse_verified(bytes: &[u8]) -> Result<KeyPackage, Rejected> {
    let outline = Outline::read(bytes)?;
    read(outline.bare)?.validate(&*CRYPTO, ProtocolVersion::Mls10).map_err(|error| match error {
        KeyPackageVerifyError::LifetimeError(_) => Rejected::Expired,
        other => refusal(&other),
    })
}

/// The provider of cryptography. Only its signature verification is used, which has no state.
static CRYPTO: LazyLock<RustCrypto> = LazyLock::new(RustCrypto::default);

enum Checkable {
    Yes,
    No,
}

fn checkable(suite: u16) -> Checkable {
    match Ciphersuite::try_from(suite) {
        Ok(suite) if CRYPTO.supports(suite).is_ok() => Checkable::Yes,
        _ => Checkable::No,
    }
}

fn check_lifetime(outline: &Outline<'_>, policy: &Policy, now: UnixMillis) -> Result<(), Rejected> {
    let now_secs = now.0 / 1000;
    if outline.not_after <= now_secs {
        return Err(Rejected::Expired);
    }
    if outline.not_before > now_secs {
        return Err(Rejected::NotYetValid);
    }
    if outline.not_after.saturating_sub(outline.not_before) > policy.max_lifetime.as_secs() {
        return Err(Rejected::LifetimeTooLong);
    }
    Ok(())
}

fn read(bare: &[u8]) -> Result<KeyPackageIn, Rejected> {
    KeyPackageIn::tls_deserialize_exact_bytes(bare).map_err(|_| Rejected::Malformed)
}

fn verify(bare: &[u8]) -> Result<(), Rejected> {
    match read(bare)?.validate(&*CRYPTO, ProtocolVersion::Mls10) {
        // openmls compares the lifetime with the system's clock after all other checks (a test
        // verifies this order). All other checks have therefore passed, and the lifetime was
        // compared with the given time before.
        Ok(_) | Err(KeyPackageVerifyError::LifetimeError(_)) => Ok(()),
        Err(error) => Err(refusal(&error)),
    }
}

fn refusal(error: &KeyPackageVerifyError) -> Rejected {
    match error {
        KeyPackageVerifyError::InvalidSignature
        | KeyPackageVerifyError::InvalidLeafNodeSignature => Rejected::BadSignature,
        KeyPackageVerifyError::InvalidProtocolVersion => Rejected::WrongVersion,
        _ => Rejected::Inconsistent,
    }
}

/// Returns RefHash("MLS 1.0 KeyPackage Reference", package) of RFC 9420 §5.2.
fn reference(bare: &[u8]) -> [u8; 32] {
    const LABEL: &[u8] = b"MLS 1.0 KeyPackage Reference";
    let label_len = u8::try_from(LABEL.len()).expect("28");
    let mut hash = Sha256::new();
    hash.update([label_len]);
    hash.update(LABEL);
    hash.update(length(bare.len()));
    hash.update(bare);
    hash.finalize().into()
}

/// Returns the length of a vector in its shortest form (RFC 9420 §2.1.2).
fn length(len: usize) -> Vec<u8> {
    let len = u32::try_from(len).expect("a package is at most as large as the policy allows");
    match len {
        0..0x40 => vec![len as u8],
        0x40..0x4000 => (len as u16 | 0x4000).to_be_bytes().to_vec(),
        _ => (len | 0x8000_0000).to_be_bytes().to_vec(),
    }
}
