//! The files of a new cluster, in memory: generated, or copied from existing files.

use std::{fs, path::Path};

use anyhow::{Context as _, ensure};
use qpq_rpc::{AtRestKeys, DeliverySigner, OpaqueServer};
use qpq_runtime::data_dir::{
    SecretFile,
    cluster::{
        AT_REST_KEYS, CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID, ClusterId, DELIVERY_KEY,
        OPAQUE_SETUP, RESET_KEY, TICKET_KEYS, TOKEN_KEY,
    },
};
use qpq_transport::{Identity, KeyRing, RESET_KEY_LEN, SelfSigned};
use rand::{RngCore as _, rngs::OsRng};
use zeroize::Zeroizing;

use super::Sources;

/// All files, in the order in which they are written.
pub(super) struct Contents {
    pub(super) secrets: [File; 6],
    pub(super) certificate: File,
    pub(super) certificate_key: File,
    /// The file that marks a directory as complete.
    pub(super) cluster_id: File,
}

/// A file of a cluster.
pub(super) struct File {
    pub(super) name: &'static str,
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) origin: Origin,
}

/// The origin of a file's contents.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Generated here. An existing file of the same name is kept instead.
    Generated,
    /// Copied from a file of the operator. An existing file must have the same contents.
    Copied,
}

impl Contents {
    /// Generates or copies all files.
    pub(super) fn gather(sources: &Sources) -> anyhow::Result<Self> {
        let ring = || KeyRing::generate().to_bytes();
        let secrets = [
            copied_or(sources, OPAQUE_SETUP, || OpaqueServer::generate(&mut OsRng).serialize())?,
            copied_or(sources, DELIVERY_KEY, || {
                Zeroizing::new(DeliverySigner::generate(&mut OsRng).secret().to_vec())
            })?,
            File::generated(TICKET_KEYS.name, ring()),
            File::generated(TOKEN_KEY.name, ring()),
            File::generated(RESET_KEY.name, random::<RESET_KEY_LEN>()),
            at_rest_keys(sources)?,
        ];
        OpaqueServer::parse(&secrets[0].bytes).context("the OPAQUE setup cannot be used")?;
        let (certificate, certificate_key) = certificate(sources)?;
        let id = random::<16>();
        let id = ClusterId::new(*id.first_chunk().expect("16 bytes"));
        let cluster_id =
            File::generated(CLUSTER_ID, Zeroizing::new(format!("{id}\n").into_bytes()));
        Ok(Self { secrets, certificate, certificate_key, cluster_id })
    }

    /// Returns all files.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        self.secrets.iter().chain([&self.certificate, &self.certificate_key, &self.cluster_id])
    }
}

impl File {
    fn generated(name: &'static str, bytes: Zeroizing<Vec<u8>>) -> Self {
        Self { name, bytes, origin: Origin::Generated }
    }

    fn copied(name: &'static str, path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        Ok(Self { name, bytes: Zeroizing::new(bytes), origin: Origin::Copied })
    }
}

/// Copies a secret from the data directory of a single node, if there is one, or generates it.
fn copied_or(
    sources: &Sources,
    file: SecretFile,
    generate: impl FnOnce() -> Zeroizing<Vec<u8>>,
) -> anyhow::Result<File> {
    let Some(from) = &sources.from else { return Ok(File::generated(file.name, generate())) };
    let path = from.join(file.name);
    let copied = File::copied(file.name, &path)?;
    ensure!(
        copied.bytes.len() == file.length,
        "{} is damaged: it has {} bytes instead of {}. Use --from with the data directory of a \
         working server",
        path.display(),
        copied.bytes.len(),
        file.length
    );
    Ok(copied)
}

/// Copies the keys at rest of the single node, or generates keys. The data directory of a release
/// without them has no such file.
fn at_rest_keys(sources: &Sources) -> anyhow::Result<File> {
    let node = sources.from.as_ref().map(|from| from.join(AT_REST_KEYS));
    match node.filter(|path| path.exists()) {
        Some(path) => {
            let copied = File::copied(AT_REST_KEYS, &path)?;
            AtRestKeys::parse(&copied.bytes)
                .with_context(|| format!("{} is damaged", path.display()))?;
            Ok(copied)
        }
        None => Ok(File::generated(AT_REST_KEYS, AtRestKeys::generate(&mut OsRng))),
    }
}

/// Returns a certificate and its key.
///
/// These are the files named by options, else those in the single node's data directory, else new
/// ones.
fn certificate(sources: &Sources) -> anyhow::Result<(File, File)> {
    let node =
        sources.from.as_ref().map(|from| (from.join(CERTIFICATE), from.join(CERTIFICATE_KEY)));
    let node = node.filter(|(cert, key)| cert.exists() || key.exists());
    let named = sources.tls_cert.clone().zip(sources.tls_key.clone());
    if let Some((cert, key)) = named.or(node) {
        Identity::load(&cert, &key)?;
        return Ok((File::copied(CERTIFICATE, &cert)?, File::copied(CERTIFICATE_KEY, &key)?));
    }
    let SelfSigned { cert, key } = SelfSigned::generate(&sources.certificate_names())?;
    Ok((File::generated(CERTIFICATE, Zeroizing::new(cert)), File::generated(CERTIFICATE_KEY, key)))
}

fn random<const LEN: usize>() -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(vec![0; LEN]);
    OsRng.fill_bytes(&mut bytes);
    bytes
}
