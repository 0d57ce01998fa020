//! A server's certificate chain and private key: read from files, or made where there are none.
//!
//! DER and PEM are told apart by their content. What is made is a self-signed ECDSA P-256
//! certificate, which foreign QUIC stacks take too; it does not expire, because clients trust its
//! key by the [`Fingerprint`].

use std::{
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::{Fingerprint, der, tls};

/// Modes of the files that are made: the key is its owner's alone.
const KEY_MODE: u32 = 0o600;
const CERT_MODE: u32 = 0o644;

/// A certificate chain with the key that belongs to it.
pub struct Identity {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
    not_after: Option<i64>,
}

/// A new certificate that signs itself, and its key, both in DER.
pub struct SelfSigned {
    /// The certificate.
    pub cert: Vec<u8>,
    /// The private key, PKCS #8.
    pub key: Zeroizing<Vec<u8>>,
}

/// Why there is no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file exists and cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Of certificate and key one is there: making a new pair would throw it away.
    #[error(
        "{present} is there but {missing} is not. Put it where it belongs, from a backup or from where the certificate \
         was issued, or name the file that belongs to the other one"
    )]
    HalfMissing {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// The certificate file holds no certificate.
    #[error("{path} holds no certificate in DER or PEM")]
    Certificate {
        /// The file.
        path: PathBuf,
    },
    /// The key file holds no private key.
    #[error("{path} holds no private key in DER or PEM (PKCS #8, SEC 1 or PKCS #1)")]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key cannot be used, or not together.
    #[error("{cert} and {key} cannot be used together: {source}")]
    Unusable {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
        /// What TLS said.
        source: rustls::Error,
    },
    /// A new certificate could not be made for these names.
    #[error("cannot make a certificate: {0}")]
    Make(String),
    /// A new certificate or key could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The bytes of both files.
pub(crate) struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl Identity {
    /// Reads certificate and key; where neither file is there, makes them for `names` (DNS names
    /// and IP addresses), in PEM if the file's name ends in `.pem`, else in DER.
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

    /// Reads certificate and key, and makes none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(cert: &Path, key: &Path) -> Result<Self, IdentityError> {
        Self::from_files(&Files::read(cert, key)?, cert, key)
    }

    /// The paths are for the errors.
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
        let not_after = der::not_after(leaf);
        Ok(Self { certified: Arc::new(certified), fingerprint, not_after })
    }

    /// The fingerprint of the leaf certificate's key.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// When the leaf certificate expires, in Unix seconds; `None` if it does not say it readably.
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
    /// Makes one as [`Identity::load_or_create`] does, but writes nothing.
    ///
    /// # Errors
    /// [`IdentityError::Make`]: a name is none.
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

    /// What tells this content from another without keeping the key in memory once more.
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
    let make = |error: rcgen::Error| IdentityError::Make(error.to_string());
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(make)?;
    let mut params = rcgen::CertificateParams::new(names).map_err(make)?;
    let name = names.first().map_or("qpq", String::as_str);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let certificate = params.self_signed(&pair).map_err(make)?;
    Ok((certificate, pair))
}

fn create(cert: &Path, key: &Path, names: &[String]) -> Result<(), IdentityError> {
    let (certificate, pair) = self_signed(names)?;
    let wants_pem = |path: &Path| path.extension().is_some_and(|extension| extension == "pem");
    let key_bytes =
        if wants_pem(key) { pair.serialize_pem().into_bytes() } else { pair.serialize_der() };
    let cert_bytes =
        if wants_pem(cert) { certificate.pem().into_bytes() } else { certificate.der().to_vec() };
    // Both are on disk before either has its name, so that a crash leaves none or both.
    let key_file = Unnamed::write(key, &key_bytes, KEY_MODE)?;
    let cert_file = Unnamed::write(cert, &cert_bytes, CERT_MODE)?;
    key_file.name(key)?;
    cert_file.name(cert)
}

/// A file on disk under a temporary name; removed if it never gets its own.
struct Unnamed {
    path: PathBuf,
}

impl Unnamed {
    fn write(target: &Path, bytes: &[u8], mode: u32) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Write { path: target.to_owned(), source };
        if let Some(directory) = directory(target) {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let mut name = target.as_os_str().to_owned();
        name.push(".new");
        let unnamed = Self { path: name.into() };
        // One that a crash left has a mode that we do not know.
        match fs::remove_file(&unnamed.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&unnamed.path)
            .map_err(failed)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok(unnamed)
    }

    fn name(self, target: &Path) -> Result<(), IdentityError> {
        let directory = directory(target).unwrap_or(Path::new("."));
        fs::rename(&self.path, target)
            .and_then(|()| fs::File::open(directory)?.sync_all())
            .map_err(|source| IdentityError::Write { path: target.to_owned(), source })
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        // After a rename there is nothing under the temporary name.
        let _ = fs::remove_file(&self.path);
    }
}

/// The directory of a file; `None` for the current one.
fn directory(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty())
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
    fn what_is_missing_is_made_once_with_tight_modes() {
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
    fn one_of_two_is_an_error_that_names_both() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (directory.path().join("cert"), directory.path().join("key"));
        make(&cert, &key).unwrap();
        fs::remove_file(&key).unwrap();
        let error = make(&cert, &key).unwrap_err();
        assert!(
            matches!(&error, IdentityError::HalfMissing { present, missing } if *present == cert && *missing == key)
        );
        assert!(!key.exists());
    }

    #[test]
    fn wrong_files_are_told_apart() {
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
