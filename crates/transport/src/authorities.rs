//! The certificate authorities that a client or a listener trusts.

use std::path::Path;

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

/// Reads the authorities in a file, in PEM or DER.
pub(crate) fn from_file(path: &Path) -> Result<RootCertStore, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let from_pem: Vec<_> =
        CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().unwrap_or_default();
    let certificates =
        if from_pem.is_empty() { vec![CertificateDer::from(bytes)] } else { from_pem };
    root_store(certificates)
}

/// Reads the authorities that the operating system trusts.
pub(crate) fn from_system() -> Result<RootCertStore, String> {
    let loaded = rustls_native_certs::load_native_certs();
    // Single unusable certificates are ignored. Without a usable one, the result is an error.
    root_store(loaded.certs)
        .map_err(|reason| loaded.errors.first().map_or(reason, |error| error.to_string()))
}

fn root_store(certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 { Err("it contains no certificate".to_owned()) } else { Ok(roots) }
}
