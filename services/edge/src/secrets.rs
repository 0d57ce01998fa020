//! The long-term secrets of the server.
//!
//! A single node creates them at its first start, before the database exists, and never again. If
//! there is a database and a secret is missing, the secret was lost. Another one would lock out
//! every account, so the server refuses to start.
//!
//! An edge of a cluster creates none. It reads the directory that all edges share
//! ([`load_shared`]).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use qpq_rpc::{DeliverySigner, OpaqueServer, opaque};
use qpq_runtime::data_dir::{
    DataDir, DataDirError, SecretFile,
    cluster::{self, ClusterDir, ClusterDirError, ClusterId, DELIVERY_KEY, OPAQUE_SETUP},
};
use qpq_store_embedded::DATABASE_FILE;
use qpq_transport::{
    Certificates, ClusterKeyFiles, ClusterKeys, ClusterKeysError, IdentityError, KeyRing,
    RESET_KEY_LEN,
};
use rand::rngs::OsRng;
use zeroize::Zeroizing;

// `qpq-runtime` declares the lengths of the files without the types of their content.
const _: () = assert!(OPAQUE_SETUP.length == opaque::len::SETUP);
const _: () = assert!(
    cluster::TICKET_KEYS.length == KeyRing::LEN && cluster::TOKEN_KEY.length == KeyRing::LEN
);
const _: () = assert!(cluster::RESET_KEY.length == RESET_KEY_LEN);

/// The secrets of every server.
pub(crate) struct Secrets {
    pub(crate) opaque: OpaqueServer,
    pub(crate) signer: DeliverySigner,
}

/// The secrets and keys that all edges of a cluster share.
pub(crate) struct ClusterSecrets {
    pub(crate) secrets: Secrets,
    /// The keys for [`qpq_transport::ClusterEdge`]. Their files must be watched, as those of the
    /// certificates.
    pub(crate) keys: Arc<ClusterKeys>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) cluster: ClusterId,
    /// The fingerprint of the OPAQUE setup, which must be the same on every edge.
    pub(crate) opaque_fingerprint: [u8; 32],
}

/// The reason why the secrets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(
        "{path} is missing although there is a database. Restore it from a backup. {if_lost} To \
         start over without data, name an empty directory with --data-dir"
    )]
    Lost { path: PathBuf, if_lost: &'static str },
    #[error("{path} is damaged: {source}")]
    Opaque { path: PathBuf, source: opaque::InvalidSetup },
    #[error(transparent)]
    Cluster(#[from] ClusterDirError),
    #[error(
        "{source}. All edges share the directory that `qpq-admin init` created: copy this file \
         from another edge or a backup"
    )]
    ClusterKeys { source: ClusterKeysError },
    #[error(
        "the cluster's certificate: {source}. All edges share the directory that `qpq-admin init` \
         created: copy certificate and key from another edge or a backup"
    )]
    ClusterCertificate { source: IdentityError },
    #[error(
        "{path} is damaged: {source}. All edges share the directory that `qpq-admin init` created: \
         copy this file from another edge or a backup"
    )]
    ClusterOpaque { path: PathBuf, source: opaque::InvalidSetup },
}

/// Reads the secrets, or creates them if there is no database yet. Must be called before the store
/// is opened.
pub(crate) fn load_or_create(dir: &DataDir) -> Result<Secrets, SecretsError> {
    let setup = one(dir, OPAQUE_SETUP, || OpaqueServer::generate(&mut OsRng).serialize())?;
    let opaque = OpaqueServer::parse(&setup).map_err(|source| SecretsError::Opaque {
        path: dir.path().join(OPAQUE_SETUP.name),
        source,
    })?;
    let seed = one(dir, DELIVERY_KEY, || {
        Zeroizing::new(DeliverySigner::generate(&mut OsRng).secret().to_vec())
    })?;
    Ok(Secrets { opaque, signer: signer(&seed) })
}

/// Reads the directory that all edges share, and creates nothing. The error names the file that is
/// missing or damaged.
pub(crate) fn load_shared(dir: &Path) -> Result<ClusterSecrets, SecretsError> {
    let dir = ClusterDir::open(dir)?;
    let cluster = dir.cluster_id()?;
    let setup = dir.secret(OPAQUE_SETUP)?;
    let opaque = OpaqueServer::parse(&setup).map_err(|source| SecretsError::ClusterOpaque {
        path: dir.file(OPAQUE_SETUP.name),
        source,
    })?;
    let signer = signer(&dir.secret(DELIVERY_KEY)?);
    for file in [cluster::TICKET_KEYS, cluster::TOKEN_KEY, cluster::RESET_KEY] {
        // Checks length and mode. The transport reads the file again while the server runs.
        dir.secret(file)?;
    }
    let keys = ClusterKeys::load(ClusterKeyFiles {
        tickets: dir.file(cluster::TICKET_KEYS.name),
        tokens: dir.file(cluster::TOKEN_KEY.name),
        reset: dir.file(cluster::RESET_KEY.name),
    })
    .map_err(|source| SecretsError::ClusterKeys { source })?;
    let certificates =
        Certificates::load(&dir.file(cluster::CERTIFICATE), &dir.file(cluster::CERTIFICATE_KEY))
            .map_err(|source| SecretsError::ClusterCertificate { source })?;
    let opaque_fingerprint = OPAQUE_SETUP.fingerprint(&setup);
    Ok(ClusterSecrets {
        secrets: Secrets { opaque, signer },
        keys,
        certificates,
        cluster,
        opaque_fingerprint,
    })
}

fn signer(seed: &[u8]) -> DeliverySigner {
    DeliverySigner::from_secret(seed.first_chunk().expect("the length is checked"))
}

fn one(
    dir: &DataDir,
    file: SecretFile,
    make: impl FnOnce() -> Zeroizing<Vec<u8>>,
) -> Result<Zeroizing<Vec<u8>>, SecretsError> {
    if dir.path().join(DATABASE_FILE).exists() {
        let lost =
            || SecretsError::Lost { path: dir.path().join(file.name), if_lost: file.if_lost };
        return dir.read_secret(file)?.ok_or_else(lost);
    }
    Ok(dir.secret(file, make)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use qpq_rpc::AtRestKeys;
    use qpq_transport::SelfSigned;

    use super::*;

    /// Creates a directory like that of `qpq-admin init`.
    pub(crate) fn shared_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, contents: &[u8]| fs::write(dir.path().join(name), contents).unwrap();
        put(OPAQUE_SETUP.name, &OpaqueServer::generate(&mut OsRng).serialize());
        put(DELIVERY_KEY.name, &DeliverySigner::generate(&mut OsRng).secret()[..]);
        put(cluster::AT_REST_KEYS, &AtRestKeys::generate(&mut OsRng));
        put(cluster::TICKET_KEYS.name, &KeyRing::generate().to_bytes());
        put(cluster::TOKEN_KEY.name, &KeyRing::generate().to_bytes());
        put(cluster::RESET_KEY.name, &b"a key of exactly 32 bytes' length"[..32]);
        let certificate = SelfSigned::generate(&["localhost".to_owned()]).unwrap();
        put(cluster::CERTIFICATE, &certificate.cert);
        put(cluster::CERTIFICATE_KEY, &certificate.key);
        put(cluster::CLUSTER_ID, ClusterId::new([1; 16]).to_string().as_bytes());
        dir
    }

    fn refusal(dir: &Path) -> String {
        load_shared(dir).err().expect("it is refused").to_string()
    }

    #[test]
    fn every_edge_reads_the_same_secrets_and_writes_nothing() {
        let dir = shared_dir();
        let listing = || {
            let mut names: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            names.into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect::<Vec<_>>()
        };
        let before = listing();
        let (one, two) = (load_shared(dir.path()).unwrap(), load_shared(dir.path()).unwrap());
        assert_eq!(listing(), before);
        assert_eq!(one.opaque_fingerprint, two.opaque_fingerprint);
        assert_eq!(one.secrets.signer.public_key(), two.secrets.signer.public_key());
        assert_eq!(one.certificates.fingerprint(), two.certificates.fingerprint());
        assert_eq!(one.cluster, two.cluster);
        let other = load_shared(shared_dir().path()).unwrap();
        assert_ne!(one.opaque_fingerprint, other.opaque_fingerprint);
    }

    #[test]
    fn the_error_names_a_missing_file_and_no_file_is_created() {
        let dir = shared_dir();
        // The tests of `at_rest` remove and damage that file.
        fs::remove_file(dir.path().join(cluster::AT_REST_KEYS)).unwrap();
        let paths: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(paths.len(), 8);
        for path in paths {
            let good = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            let said = refusal(dir.path());
            assert!(said.contains(&format!("{} is missing", path.display())), "{said}");
            assert!(said.contains("qpq-admin init"), "{said}");
            assert!(!path.exists());
            fs::write(&path, good).unwrap();
        }
        let none = dir.path().join("none");
        let said = refusal(&none);
        assert!(said.contains(none.to_str().unwrap()) && said.contains("qpq-admin init"), "{said}");
        assert!(!none.exists());
    }

    #[test]
    fn the_error_names_a_damaged_file_and_qpq_admin_init() {
        let dir = shared_dir();
        fs::remove_file(dir.path().join(cluster::AT_REST_KEYS)).unwrap();
        for entry in fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            let good = fs::read(&path).unwrap();
            // A file that is too short, and zeros of the right length. Any 32 bytes are a valid
            // delivery key.
            let blank = vec![0; good.len()];
            let damages = if path.ends_with(DELIVERY_KEY.name) {
                vec![&b"x"[..]]
            } else {
                vec![&b"x"[..], &blank]
            };
            for damage in damages {
                fs::write(&path, damage).unwrap();
                let said = refusal(dir.path());
                assert!(
                    said.contains(path.to_str().unwrap()) && said.contains("qpq-admin init"),
                    "{said}"
                );
            }
            fs::write(&path, good).unwrap();
        }
        assert!(load_shared(dir.path()).is_ok());
    }
}
