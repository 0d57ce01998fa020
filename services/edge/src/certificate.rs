//! The certificate of a single node: read from its files, or created if both files are missing and
//! `tls.generate` allows it.

use std::path::{Path, PathBuf};

use qpq_transport::{Certificates, IdentityError};

use crate::{Config, config::Generate};

/// The reason why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("the certificate: {0}")]
    Tls(#[from] IdentityError),
    #[error(
        "there is neither a certificate at {} nor a key at {}, and tls.generate is \"never\": put \
         both there, or name the files with tls.cert and tls.key",
        cert.display(), key.display()
    )]
    Missing { cert: PathBuf, key: PathBuf },
    #[error(
        "the certificate: {present} exists but {missing} does not. {cause}",
        present = present.display(),
        missing = missing.display()
    )]
    HalfMissing { present: PathBuf, missing: PathBuf, cause: &'static str },
}

/// The files at the paths of certificate and key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Both,
    /// Neither the certificate nor the key. `is_named` if the configuration names a file.
    Neither {
        is_named: bool,
    },
}

/// A certificate, and its path if it was created although the configuration names a file.
pub(crate) struct Opened {
    pub(crate) certificates: std::sync::Arc<Certificates>,
    pub(crate) created_at: Option<PathBuf>,
}

/// Returns the names in a created certificate: `domain`, those of this machine, and `others`.
pub fn certificate_names<'a>(
    domain: &str,
    others: impl IntoIterator<Item = &'a String>,
) -> Vec<String> {
    let mut names = vec![domain.to_owned()];
    let local = ["localhost", "127.0.0.1", "::1"].map(String::from);
    for name in local.into_iter().chain(others.into_iter().cloned()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Checks whether the files of certificate and key exist, without reading them.
pub(crate) fn look(config: &Config) -> Result<Found, CertificateError> {
    let (cert, key) = config.tls_files();
    let exists = |path: &Path| {
        path.try_exists().map_err(|source| IdentityError::Read { path: path.to_owned(), source })
    };
    let half = |present: &Path, missing: &Path, cause| {
        Err(CertificateError::HalfMissing {
            present: present.to_owned(),
            missing: missing.to_owned(),
            cause,
        })
    };
    let named = (config.tls.cert.is_some(), config.tls.key.is_some());
    let both_or_none =
        "Restore it from a backup, or copy it from the place where the certificate was issued";
    match (exists(&cert)?, exists(&key)?) {
        (true, true) => Ok(Found::Both),
        (false, false) => Ok(Found::Neither { is_named: named.0 || named.1 }),
        (true, false) if named == (true, false) => half(
            &cert,
            &key,
            "tls.cert is set and tls.key is not: name the key that belongs to the certificate",
        ),
        (false, true) if named == (false, true) => half(
            &key,
            &cert,
            "tls.key is set and tls.cert is not: name the certificate that belongs to the key",
        ),
        (true, false) => half(&cert, &key, both_or_none),
        (false, true) => half(&key, &cert, both_or_none),
    }
}

/// Reads the files of certificate and key, or creates them.
pub(crate) fn open(config: &Config) -> Result<Opened, CertificateError> {
    let (cert, key) = config.tls_files();
    let created_at = match (look(config)?, config.tls.generate.0) {
        (Found::Both, _) | (Found::Neither { is_named: false }, Generate::IfMissing) => None,
        (Found::Neither { .. }, Generate::Never) => {
            return Err(CertificateError::Missing { cert, key });
        }
        (Found::Neither { is_named: true }, Generate::IfMissing) => Some(cert.clone()),
    };
    let certificates = match config.tls.generate.0 {
        Generate::IfMissing => Certificates::load_or_create(&cert, &key, &config.tls_names())?,
        Generate::Never => Certificates::load(&cert, &key)?,
    };
    if let Some(cert) = &created_at {
        tracing::warn!(
            cert = %cert.display(),
            key = %key.display(),
            "configured certificate and key did not exist, self-signed certificate created"
        );
    }
    Ok(Opened { certificates, created_at })
}
