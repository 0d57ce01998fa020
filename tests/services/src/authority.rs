//! A certificate authority for one test, which issues server certificates for 127.0.0.1 only.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::process::{new_password, write_private};

/// A certificate authority. Dropping it removes its file.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The directory with the authority's certificate.
    dir: tempfile::TempDir,
}

/// A server's certificate with its key, as PEM files.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    pub fn new() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A unique name: authorities with the same name would differ only by their signatures.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("an authority for tests {}", new_password()));
        let dir = tempfile::tempdir().context("cannot create a temporary directory")?;
        fs::write(dir.path().join("ca.pem"), params.self_signed(&key)?.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), dir })
    }

    /// Returns the path of the authority's certificate, for clients to trust.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Issues a certificate and writes it to `dir`.
    pub(crate) fn issue(&self, dir: &Path) -> anyhow::Result<Issued> {
        let pair = KeyPair::generate()?;
        let params = CertificateParams::new(["127.0.0.1".to_owned()])?;
        let issued = Issued { certificate: dir.join("server.pem"), key: dir.join("server.key") };
        fs::write(&issued.certificate, params.signed_by(&pair, &self.issuer)?.pem())?;
        write_private(&issued.key, &pair.serialize_pem())?;
        Ok(issued)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("dir", &self.dir.path()).finish_non_exhaustive()
    }
}
