//! The servers that a client trusts, and the verification of their certificates.

use std::{fmt, path::PathBuf, sync::Arc};

use parking_lot::Mutex;
use rustls::{
    CertificateError, DigitallySignedStruct, Error, PeerIncompatible, RootCertStore,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use crate::{authorities, fingerprint::Fingerprint, tls};

/// The way in which a client authenticates a server.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The server has this key. Name, issuer and dates of the certificate are ignored. A
    /// fingerprint of the whole certificate, as in earlier releases, is accepted too.
    Pin(Fingerprint),
    /// The server has either of two keys, while one replaces the other.
    PinEither([Fingerprint; 2]),
    /// Any server is trusted. The caller stores
    /// [`Connection::fingerprint`](super::Connection::fingerprint) and pins it from then on.
    FirstUse,
    /// A certificate authority in this file, in PEM or DER, has issued the server's certificate.
    CaFile(PathBuf),
    /// A certificate authority that the operating system trusts has issued the server's
    /// certificate.
    SystemRoots,
}

/// The reason why the certificate authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file cannot be read, or does not contain a certificate.
    #[error("cannot read certificate authorities from {path}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// The authorities of the operating system cannot be read.
    #[error("the system's certificate authorities cannot be read: {0}")]
    SystemRoots(String),
}

/// A [`Trust`] with its authorities loaded.
#[derive(Clone)]
pub(super) struct TrustAnchors {
    check: Check,
    provider: Arc<CryptoProvider>,
}

#[derive(Clone)]
enum Check {
    /// The fingerprints to accept, at least one.
    Pins(Vec<Fingerprint>),
    FirstUse,
    Authorities(Arc<WebPkiServerVerifier>),
}

impl TrustAnchors {
    pub(super) fn load(trust: Trust) -> Result<Self, TrustError> {
        let provider = tls::provider();
        let check = match trust {
            Trust::Pin(fingerprint) => Check::Pins(vec![fingerprint]),
            Trust::PinEither(fingerprints) => Check::Pins(fingerprints.into()),
            Trust::FirstUse => Check::FirstUse,
            Trust::CaFile(path) => verifier(authorities::from_file(&path), &provider)
                .map(Check::Authorities)
                .map_err(|reason| TrustError::CaFile { path, reason })?,
            Trust::SystemRoots => verifier(authorities::from_system(), &provider)
                .map(Check::Authorities)
                .map_err(TrustError::SystemRoots)?,
        };
        Ok(Self { check, provider })
    }

    /// Returns the verifier for one connection.
    pub(super) fn verifier(&self) -> ServerVerifier {
        ServerVerifier { anchors: self.clone(), verified: Mutex::default() }
    }
}

impl fmt::Debug for TrustAnchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.check {
            Check::Pins(pins) => f.debug_tuple("Pins").field(pins).finish(),
            Check::FirstUse => f.write_str("FirstUse"),
            Check::Authorities(_) => f.write_str("Authorities"),
        }
    }
}

fn verifier(
    roots: Result<RootCertStore, String>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots?), Arc::clone(provider))
        .build()
        .map_err(|error| error.to_string())
}

/// Verifies the certificate of one server and remembers the outcome, because the error of a failed
/// handshake contains only text.
pub(super) struct ServerVerifier {
    anchors: TrustAnchors,
    verified: Mutex<Verified>,
}

/// The outcome of a verification.
#[derive(Default)]
struct Verified {
    seen: Option<Fingerprint>,
    rejection: Option<Rejection>,
}

/// The reason why a certificate was rejected.
#[derive(Debug, Clone)]
pub(super) enum Rejection {
    Pin { expected: Fingerprint, seen: Fingerprint },
    Untrusted(String),
}

impl ServerVerifier {
    /// Returns the fingerprint of the server's key, after the handshake.
    pub(super) fn seen(&self) -> Option<Fingerprint> {
        self.verified.lock().seen
    }

    /// Returns the reason why the certificate was rejected; `None` if it was not rejected.
    pub(super) fn rejection(&self) -> Option<Rejection> {
        self.verified.lock().rejection.take()
    }
}

impl ServerCertVerifier for ServerVerifier {
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
        let (checked, rejection) = match &self.anchors.check {
            Check::FirstUse => (Ok(()), None),
            Check::Pins(pins) if pins.contains(&seen) || pins.contains(&certificate) => {
                (Ok(()), None)
            }
            Check::Pins(pins) => (
                Err(CertificateError::ApplicationVerificationFailure.into()),
                Some(Rejection::Pin { expected: pins[0], seen }),
            ),
            Check::Authorities(verifier) => {
                let checked = verifier
                    .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                    .map(drop);
                let rejection =
                    checked.as_ref().err().map(|error| Rejection::Untrusted(error.to_string()));
                (checked, rejection)
            }
        };
        *self.verified.lock() = Verified { seen: Some(seen), rejection };
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

    /// Verifies that the server has the private key. A pinned certificate is public, and without
    /// this check any server could send it.
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
            &self.anchors.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.anchors.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServerVerifier").field(&self.anchors).finish()
    }
}
