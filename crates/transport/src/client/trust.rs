//! Which servers a client trusts, and the certificate check that follows from it.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustls::{
    CertificateError, DigitallySignedStruct, Error, PeerIncompatible, RootCertStore,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

use crate::{Fingerprint, tls};

/// How a client decides that a server is the right one.
#[derive(Debug, Clone)]
pub enum Trust {
    /// By its key, whatever the certificate says: name, issuer and dates are not looked at. A
    /// fingerprint of the whole certificate, as earlier releases had, is accepted too.
    Pin(Fingerprint),
    /// As [`Trust::Pin`], by either of two keys: while one takes the place of the other.
    PinEither([Fingerprint; 2]),
    /// Whoever answers. The caller remembers
    /// [`Connection::fingerprint`](super::Connection::fingerprint) and pins it from then on.
    FirstUse,
    /// By the certificate authorities in a file, in PEM or DER.
    CaFile(PathBuf),
    /// By the certificate authorities that the operating system trusts.
    SystemRoots,
}

/// Why the certificate authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file cannot be read, or holds no certificate.
    #[error("cannot read certificate authorities from {path}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system has none.
    #[error("the system's certificate authorities cannot be read: {0}")]
    SystemRoots(String),
}

/// A [`Trust`] with its authorities read.
#[derive(Clone)]
pub(super) struct Roots {
    check: Check,
    provider: Arc<CryptoProvider>,
}

#[derive(Clone)]
enum Check {
    /// At least one.
    Pins(Vec<Fingerprint>),
    Any,
    Authorities(Arc<WebPkiServerVerifier>),
}

impl Roots {
    pub(super) fn load(trust: Trust) -> Result<Self, TrustError> {
        let provider = tls::provider();
        let check = match trust {
            Trust::Pin(fingerprint) => Check::Pins(vec![fingerprint]),
            Trust::PinEither(fingerprints) => Check::Pins(fingerprints.into()),
            Trust::FirstUse => Check::Any,
            Trust::CaFile(path) => from_file(&path, &provider)
                .map(Check::Authorities)
                .map_err(|reason| TrustError::CaFile { path, reason })?,
            Trust::SystemRoots => {
                Check::Authorities(from_system(&provider).map_err(TrustError::SystemRoots)?)
            }
        };
        Ok(Self { check, provider })
    }

    /// The check of one connection.
    pub(super) fn certifier(&self) -> Certifier {
        Certifier { roots: self.clone(), outcome: Mutex::default() }
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.check {
            Check::Pins(pins) => f.debug_tuple("Pins").field(pins).finish(),
            Check::Any => f.write_str("FirstUse"),
            Check::Authorities(_) => f.write_str("Authorities"),
        }
    }
}

fn from_file(
    path: &Path,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let from_pem: Vec<_> =
        CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().unwrap_or_default();
    let certificates =
        if from_pem.is_empty() { vec![CertificateDer::from(bytes)] } else { from_pem };
    verifier(certificates, provider)
}

fn from_system(provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, String> {
    let loaded = rustls_native_certs::load_native_certs();
    // Some may be unreadable or odd; only if none is left is it an error.
    verifier(loaded.certs, provider)
        .map_err(|reason| loaded.errors.first().map_or(reason, |error| error.to_string()))
}

fn verifier(
    certificates: Vec<CertificateDer<'static>>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err("no certificate in it".to_owned());
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| error.to_string())
}

/// Checks one server, and remembers what it saw: rustls gives only text to those who ask why a
/// handshake failed.
pub(super) struct Certifier {
    roots: Roots,
    outcome: Mutex<Outcome>,
}

#[derive(Default)]
struct Outcome {
    seen: Option<Fingerprint>,
    rejected: Option<Rejected>,
}

/// Why a certificate was not accepted.
#[derive(Debug, Clone)]
pub(super) enum Rejected {
    Pin { expected: Fingerprint, seen: Fingerprint },
    Check(String),
}

impl Certifier {
    /// The key of the server, once the handshake is over.
    pub(super) fn seen(&self) -> Option<Fingerprint> {
        self.outcome.lock().seen
    }

    pub(super) fn rejected(&self) -> Option<Rejected> {
        self.outcome.lock().rejected.take()
    }
}

impl ServerCertVerifier for Certifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let seen =
            Fingerprint::of_key(end_entity).ok_or(Error::from(CertificateError::BadEncoding))?;
        let certificate = Fingerprint::of_certificate(end_entity);
        let (checked, rejected) = match &self.roots.check {
            Check::Any => (Ok(()), None),
            Check::Pins(pins) if pins.contains(&seen) || pins.contains(&certificate) => {
                (Ok(()), None)
            }
            Check::Pins(pins) => (
                Err(CertificateError::ApplicationVerificationFailure.into()),
                Some(Rejected::Pin { expected: pins[0], seen }),
            ),
            Check::Authorities(verifier) => {
                let checked = verifier
                    .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                    .map(drop);
                let rejected =
                    checked.as_ref().err().map(|error| Rejected::Check(error.to_string()));
                (checked, rejected)
            }
        };
        *self.outcome.lock() = Outcome { seen: Some(seen), rejected };
        checked.map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    /// Without this a pinned certificate, which is public, could be shown by anybody.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.roots.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.roots.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for Certifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Certifier").field(&self.roots).finish()
    }
}
