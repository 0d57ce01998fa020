//! A server's certificate chain and private key, read from files, or created if there are none.
//!
//! Files may be DER or PEM, with any name. A created certificate is self-signed with ECDSA P-256,
//! which all QUIC stacks support. Such a certificate does not expire, because clients trust its key
//! by the [`Fingerprint`].

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use qpq_durable_file::{self as durable_file, Draft};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::{fingerprint::Fingerprint, tls, x509};

/// Modes of created files. Only the owner may read the key.
const KEY_MODE: u32 = 0o600;
const CERT_MODE: u32 = 0o644;

/// A certificate chain with its private key.
pub struct Identity {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
    not_after: Option<i64>,
}

/// A new self-signed certificate and its private key, both in DER.
pub struct SelfSigned {
    /// The certificate.
    pub cert: Vec<u8>,
    /// The private key, PKCS #8.
    pub key: Zeroizing<Vec<u8>>,
}

/// The reason why there is no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Only one of certificate and key exists. A new pair would make the existing file useless.
    #[error(
        "{present} exists, but {missing} does not. Restore {missing} from a backup or from the \
         issuer of the certificate, or configure the file that belongs to {present}"
    )]
    HalfMissing {
        /// The file that exists.
        present: PathBuf,
        /// The file that does not exist.
        missing: PathBuf,
    },
    /// The certificate file does not contain a certificate.
    #[error("{path} does not contain a certificate in DER or PEM")]
    Certificate {
        /// The file.
        path: PathBuf,
    },
    /// The key file does not contain a private key.
    #[error("{path} does not contain a private key in DER or PEM (PKCS #8, SEC 1 or PKCS #1)")]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// Certificate or key cannot be used, or they do not belong together.
    #[error("{cert} and {key} cannot be used together: {source}")]
    Unusable {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
        /// The error of TLS.
        source: rustls::Error,
    },
    /// A certificate for these names cannot be created.
    #[error("cannot create a certificate: {0}")]
    Create(String),
    /// A new certificate or key cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// The contents of the files of certificate and key.
pub(crate) struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl Identity {
    /// Reads certificate and key. If neither file exists, creates both for `names` (DNS names and
    /// IP addresses), in PEM if the file's name ends in `.pem`, else in DER.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load_or_create(
        cert: &Path,
        key: &Path,
        names: &[String],
    ) -> Result<Self, IdentityError> {
        if Files::exist(cert, key)? == Existing::None {
            create(cert, key, names)?;
        }
        Self::load(cert, key)
    }

    /// Reads certificate and key.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(cert: &Path, key: &Path) -> Result<Self, IdentityError> {
        Self::from_files(&Files::read(cert, key)?, cert, key)
    }

    /// Parses the contents of both files. The paths are for the errors.
    pub(crate) fn from_files(
        files: &Files,
        cert: &Path,
        key: &Path,
    ) -> Result<Self, IdentityError> {
        let chain = parse_chain(&files.cert)
            .ok_or_else(|| IdentityError::Certificate { path: cert.to_owned() })?;
        let private =
            parse_key(&files.key).ok_or_else(|| IdentityError::Key { path: key.to_owned() })?;
        let unusable =
            |source| IdentityError::Unusable { cert: cert.to_owned(), key: key.to_owned(), source };
        let certified =
            CertifiedKey::from_der(chain, private, &tls::provider()).map_err(unusable)?;
        let leaf = certified.end_entity_cert().map_err(unusable)?;
        let fingerprint = Fingerprint::of_key(leaf)
            .ok_or_else(|| IdentityError::Certificate { path: cert.to_owned() })?;
        let not_after = x509::not_after(leaf);
        Ok(Self { certified: Arc::new(certified), fingerprint, not_after })
    }

    /// Returns the fingerprint of the leaf certificate's key.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Returns the end of validity of the leaf certificate in Unix seconds, or `None` if it cannot
    /// be read.
    #[must_use]
    pub fn not_after(&self) -> Option<i64> {
        self.not_after
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl SelfSigned {
    /// Creates a certificate as [`Identity::load_or_create`] does, without writing it.
    ///
    /// # Errors
    /// [`IdentityError::Create`]: a name is not valid.
    pub fn generate(names: &[String]) -> Result<Self, IdentityError> {
        let (certificate, pair) = self_signed(names)?;
        Ok(Self { cert: certificate.der().to_vec(), key: Zeroizing::new(pair.serialize_der()) })
    }
}

impl fmt::Debug for SelfSigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SelfSigned")
            .field("key", &Fingerprint::of_key(&self.cert))
            .finish_non_exhaustive()
    }
}

#[derive(PartialEq)]
enum Existing {
    None,
    Both,
}

impl Files {
    pub(crate) fn read(cert: &Path, key: &Path) -> Result<Self, IdentityError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| IdentityError::Read { path: path.to_owned(), source })
        };
        Ok(Self { cert: read(cert)?, key: read(key)? })
    }

    /// Returns a hash for comparing contents, so that the key is not in memory twice.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let cert = Sha256::digest(&self.cert);
        Sha256::new().chain_update(cert).chain_update(&self.key).finalize().into()
    }

    fn exist(cert: &Path, key: &Path) -> Result<Existing, IdentityError> {
        let exists = |path: &Path| {
            path.try_exists()
                .map_err(|source| IdentityError::Read { path: path.to_owned(), source })
        };
        let half = |present: &Path, missing: &Path| {
            Err(IdentityError::HalfMissing {
                present: present.to_owned(),
                missing: missing.to_owned(),
            })
        };
        match (exists(cert)?, exists(key)?) {
            (false, false) => Ok(Existing::None),
            (true, true) => Ok(Existing::Both),
            (true, false) => half(cert, key),
            (false, true) => half(key, cert),
        }
    }
}

fn is_pem(bytes: &[u8]) -> bool {
    bytes.windows(11).any(|window| window == b"-----BEGIN ")
}

fn parse_chain(bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    if !is_pem(bytes) {
        return (!bytes.is_empty()).then(|| vec![CertificateDer::from(bytes.to_vec())]);
    }
    let chain: Vec<_> = CertificateDer::pem_slice_iter(bytes).collect::<Result<_, _>>().ok()?;
    (!chain.is_empty()).then_some(chain)
}

fn parse_key(bytes: &[u8]) -> Option<PrivateKeyDer<'static>> {
    if is_pem(bytes) {
        PrivateKeyDer::from_pem_slice(bytes).ok()
    } else {
        PrivateKeyDer::try_from(bytes.to_vec()).ok()
    }
}

fn self_signed(names: &[String]) -> Result<(rcgen::Certificate, rcgen::KeyPair), IdentityError> {
    let failed = |error: rcgen::Error| IdentityError::Create(error.to_string());
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = rcgen::CertificateParams::new(names).map_err(failed)?;
    let name = names.first().map_or("qpq", String::as_str);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let certificate = params.self_signed(&pair).map_err(failed)?;
    Ok((certificate, pair))
}

fn create(cert: &Path, key: &Path, names: &[String]) -> Result<(), IdentityError> {
    let (certificate, pair) = self_signed(names)?;
    let wants_pem = |path: &Path| path.extension().is_some_and(|extension| extension == "pem");
    let key_bytes =
        if wants_pem(key) { pair.serialize_pem().into_bytes() } else { pair.serialize_der() };
    let cert_bytes =
        if wants_pem(cert) { certificate.pem().into_bytes() } else { certificate.der().to_vec() };
    // Both drafts are on disk before either gets its name, so that a full disk leaves neither file.
    let key_draft = draft(key, &key_bytes, KEY_MODE)?;
    let cert_draft = draft(cert, &cert_bytes, CERT_MODE)?;
    publish(key_draft, key)?;
    publish(cert_draft, cert)
}

/// Writes the draft of a file, which gets its name later, and creates the directory if there is
/// none.
fn draft(target: &Path, bytes: &[u8], mode: u32) -> Result<Draft, IdentityError> {
    fs::create_dir_all(durable_file::directory_of(target))
        .and_then(|()| Draft::with_contents(target, bytes, mode))
        .map_err(|source| IdentityError::Write { path: target.to_owned(), source })
}

fn publish(draft: Draft, target: &Path) -> Result<(), IdentityError> {
    draft.replace().map_err(|source| IdentityError::Write { path: target.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names() -> Vec<String> {
        vec!["localhost".to_owned(), "127.0.0.1".to_owned()]
    }

    fn make(cert: &Path, key: &Path) -> Result<Identity, IdentityError> {
        Identity::load_or_create(cert, key, &names())
    }

    #[test]
    fn missing_files_are_created_once_with_restrictive_modes() {
        let directory = tempfile::tempdir().unwrap();
        for extension in ["der", "pem"] {
            let cert = directory.path().join("deeper").join(format!("cert.{extension}"));
            let key = directory.path().join(format!("key.{extension}"));
            let made = make(&cert, &key).unwrap();
            assert_eq!(make(&cert, &key).unwrap().fingerprint(), made.fingerprint());
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&key), mode(&cert)), (0o600, 0o644));
            assert_eq!(is_pem(&fs::read(&key).unwrap()), extension == "pem");
            assert_eq!(is_pem(&fs::read(&cert).unwrap()), extension == "pem");
            assert!(made.not_after().unwrap() > 60_000_000_000);
        }
        let left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }

    #[test]
    fn a_renewed_certificate_of_the_same_key_has_the_same_fingerprint() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (directory.path().join("cert"), directory.path().join("key"));
        let made = make(&cert, &key).unwrap();
        let pair = rcgen::KeyPair::try_from(fs::read(&key).unwrap()).unwrap();
        let renewed = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let before = fs::read(&cert).unwrap();
        fs::write(&cert, renewed.self_signed(&pair).unwrap().der()).unwrap();
        assert_ne!(fs::read(&cert).unwrap(), before);
        assert_eq!(make(&cert, &key).unwrap().fingerprint(), made.fingerprint());
    }

    #[test]
    fn one_file_without_the_other_is_an_error_that_names_both() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (directory.path().join("cert"), directory.path().join("key"));
        make(&cert, &key).unwrap();
        fs::remove_file(&key).unwrap();
        let error = make(&cert, &key).unwrap_err();
        assert!(matches!(&error, IdentityError::HalfMissing { present, missing }
                if *present == cert && *missing == key));
        assert!(!key.exists());
    }

    #[test]
    fn each_unusable_file_has_its_own_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        make(&path("cert"), &path("key")).unwrap();
        make(&path("cert2"), &path("key2")).unwrap();
        fs::write(path("noise"), [7; 100]).unwrap();
        fs::write(path("empty"), []).unwrap();
        let error = |cert: &str, key: &str| make(&path(cert), &path(key)).unwrap_err();
        assert!(matches!(error("cert", "key2"), IdentityError::Unusable { .. }));
        assert!(matches!(error("noise", "key"), IdentityError::Unusable { .. }));
        assert!(matches!(error("empty", "key"), IdentityError::Certificate { .. }));
        assert!(matches!(error("cert", "noise"), IdentityError::Key { .. }));
    }
}
