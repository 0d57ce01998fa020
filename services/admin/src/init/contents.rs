//! The files of a new cluster, in memory: made here, or taken from where the operator has them.

use std::{fs, path::Path};

use anyhow::{Context as _, ensure};
use qpq_rpc::{DeliverySigner, OpaqueServer};
use qpq_runtime::data_dir::{
    SecretFile,
    cluster::{
        CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID, ClusterId, DELIVERY_KEY, OPAQUE_SETUP, RESET_KEY,
        TICKET_KEYS, TOKEN_KEY,
    },
};
use qpq_transport::{Identity, KeyRing, RESET_KEY_LEN, SelfSigned};
use rand::{RngCore as _, rngs::OsRng};
use zeroize::Zeroizing;

use super::Given;

/// All files, in the order in which they are written.
pub(super) struct Contents {
    pub(super) secrets: [File; 5],
    pub(super) certificate: File,
    pub(super) certificate_key: File,
    /// What finishes a directory.
    pub(super) cluster_id: File,
}

pub(super) struct File {
    pub(super) name: &'static str,
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) origin: Origin,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// As good as any other.
    Made,
    /// It must be this.
    Given,
}

impl Contents {
    pub(super) fn gather(given: &Given) -> anyhow::Result<Self> {
        let ring = || KeyRing::generate().to_bytes();
        let secrets = [
            taken_or(given, OPAQUE_SETUP, || OpaqueServer::generate(&mut OsRng).serialize())?,
            taken_or(given, DELIVERY_KEY, || {
                Zeroizing::new(DeliverySigner::generate(&mut OsRng).secret().to_vec())
            })?,
            File::made(TICKET_KEYS.name, ring()),
            File::made(TOKEN_KEY.name, ring()),
            File::made(RESET_KEY.name, random::<RESET_KEY_LEN>()),
        ];
        OpaqueServer::parse(&secrets[0].bytes).context("the OPAQUE setup cannot be used")?;
        let (certificate, certificate_key) = certificate(given)?;
        let id = random::<16>();
        let id = ClusterId::new(*id.first_chunk().expect("so many were asked for"));
        let cluster_id = File::made(CLUSTER_ID, Zeroizing::new(format!("{id}\n").into_bytes()));
        Ok(Self { secrets, certificate, certificate_key, cluster_id })
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        self.secrets.iter().chain([&self.certificate, &self.certificate_key, &self.cluster_id])
    }
}

impl File {
    fn made(name: &'static str, bytes: Zeroizing<Vec<u8>>) -> Self {
        Self { name, bytes, origin: Origin::Made }
    }

    fn given(name: &'static str, path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        Ok(Self { name, bytes: Zeroizing::new(bytes), origin: Origin::Given })
    }
}

fn taken_or(
    given: &Given,
    file: SecretFile,
    make: impl FnOnce() -> Zeroizing<Vec<u8>>,
) -> anyhow::Result<File> {
    let Some(from) = &given.from else { return Ok(File::made(file.name, make())) };
    let path = from.join(file.name);
    let taken = File::given(file.name, &path)?;
    ensure!(
        taken.bytes.len() == file.length,
        "{} is damaged: it has {} bytes instead of {}. Name the data directory of a server that starts, with --from",
        path.display(),
        taken.bytes.len(),
        file.length
    );
    Ok(taken)
}

/// The given pair, else that of the server that grows up, unless it had its elsewhere; else a new
/// one.
fn certificate(given: &Given) -> anyhow::Result<(File, File)> {
    let taken =
        given.from.as_ref().map(|from| (from.join(CERTIFICATE), from.join(CERTIFICATE_KEY)));
    let taken = taken.filter(|(cert, key)| cert.exists() || key.exists());
    let named = given.tls_cert.clone().zip(given.tls_key.clone());
    if let Some((cert, key)) = named.or(taken) {
        Identity::load(&cert, &key)?;
        return Ok((File::given(CERTIFICATE, &cert)?, File::given(CERTIFICATE_KEY, &key)?));
    }
    let SelfSigned { cert, key } = SelfSigned::generate(&given.certificate_names())?;
    Ok((File::made(CERTIFICATE, Zeroizing::new(cert)), File::made(CERTIFICATE_KEY, key)))
}

fn random<const LEN: usize>() -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(vec![0; LEN]);
    OsRng.fill_bytes(&mut bytes);
    bytes
}
