//! The server's long-term secrets: made at the first start, before there is a database, and never again.
//!
//! A secret that is missing beside a database was lost, not never made. Making another one would lock out every account
//! without a word, so the server refuses to start.

use std::path::PathBuf;

use qpq_rpc::{DeliverySigner, OpaqueServer, opaque};
use qpq_runtime::data_dir::{DataDir, DataDirError, SecretFile};
use rand::rngs::OsRng;
use zeroize::Zeroizing;

const OPAQUE_SETUP: SecretFile = SecretFile {
    name: "opaque-setup.bin",
    length: opaque::len::SETUP,
    if_lost: "Without it no account can log in again.",
};
const DELIVERY_KEY: SecretFile = SecretFile {
    name: "delivery-key.bin",
    length: 32,
    if_lost: "Without it the delivery proofs signed so far can no longer be checked against this server.",
};
/// The database that the embedded store makes in the data directory.
const DATABASE: &str = "qpq.db";

/// What was read or made.
pub(crate) struct Secrets {
    pub(crate) opaque: OpaqueServer,
    pub(crate) signer: DeliverySigner,
}

/// Why the secrets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(
        "{path} is missing although there is a database. Restore it from a backup. {if_lost} To start over with \
         nothing, name an empty directory with --data-dir"
    )]
    Lost { path: PathBuf, if_lost: &'static str },
    #[error("{path} is damaged: {source}")]
    Opaque { path: PathBuf, source: opaque::InvalidSetup },
}

/// Reads the secrets, or makes them where there is no database yet. Call it before the store is opened.
pub(crate) fn load_or_create(dir: &DataDir) -> Result<Secrets, SecretsError> {
    let setup = one(dir, OPAQUE_SETUP, || OpaqueServer::generate(&mut OsRng).serialize())?;
    let opaque = OpaqueServer::parse(&setup)
        .map_err(|source| SecretsError::Opaque { path: dir.path().join(OPAQUE_SETUP.name), source })?;
    let seed =
        one(dir, DELIVERY_KEY, || Zeroizing::new(DeliverySigner::generate(&mut OsRng).secret().to_vec()))?;
    let seed = seed.first_chunk().expect("the length was checked");
    Ok(Secrets { opaque, signer: DeliverySigner::from_secret(seed) })
}

fn one(
    dir: &DataDir,
    file: SecretFile,
    make: impl FnOnce() -> Zeroizing<Vec<u8>>,
) -> Result<Zeroizing<Vec<u8>>, SecretsError> {
    if dir.path().join(DATABASE).exists() {
        let lost = || SecretsError::Lost { path: dir.path().join(file.name), if_lost: file.if_lost };
        return dir.read_secret(file)?.ok_or_else(lost);
    }
    Ok(dir.secret(file, make)?)
}
