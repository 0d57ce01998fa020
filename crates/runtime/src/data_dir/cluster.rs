//! The directory with the secrets that all edges of a cluster share. `qpq-admin init` creates it
//! once, and every edge has the same copy. Edges only read it, except that an edge rotates
//! `ticket-keys` if `cluster.rotate_ticket_keys` is set.
//!
//! | file | use | rotated |
//! |---|---|---|
//! | `opaque-setup.bin` | checks passwords | never: every account depends on it |
//! | `delivery-key.bin` | signs delivery proofs | never: proofs are checked against it |
//! | `ticket-keys` | TLS session tickets: previous, current and next key | `qpq-admin rotate-ticket-keys` every 6 hours, or a job of the edges; edges reload it |
//! | `token-key` | Retry tokens: previous, current and next key | `qpq-admin rotate-token-key`; edges reload it |
//! | `at-rest-keys` | seals stored data of accounts, as recovery bundles: old keys, the current and the next one | `qpq-admin rotate-at-rest-keys`, then by restarting the edges one after the other |
//! | `reset-key` | stateless resets | by replacing the file and restarting the edges one after the other |
//! | `server-cert.der`, `server-key.der` | the certificate and its key, in DER or PEM | by replacing both; edges reload them |
//! | `cluster-id` | 32 hexadecimal digits, not secret | never |
//!
//! `cluster-id` is written last: a directory without it is incomplete.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use zeroize::Zeroizing;

use super::{DataDir, DataDirError, OTHERS, SecretFile};

/// The OPAQUE server setup, which checks passwords.
pub const OPAQUE_SETUP: SecretFile = SecretFile {
    name: "opaque-setup.bin",
    length: 128,
    if_lost: "Without it no account can log in again.",
};
/// The key that signs delivery proofs.
pub const DELIVERY_KEY: SecretFile = SecretFile {
    name: "delivery-key.bin",
    length: 32,
    if_lost: "Without it the delivery proofs signed so far can no longer be verified.",
};
/// A ring of three keys for TLS session tickets.
pub const TICKET_KEYS: SecretFile = SecretFile {
    name: "ticket-keys",
    length: 96,
    if_lost: "With other keys each client needs one more full handshake.",
};
/// A ring of three keys for the tokens with which clients prove their address.
pub const TOKEN_KEY: SecretFile = SecretFile {
    name: "token-key",
    length: 96,
    if_lost: "With other keys clients that are connecting must retry.",
};
/// The key of stateless resets.
pub const RESET_KEY: SecretFile = SecretFile {
    name: "reset-key",
    length: 32,
    if_lost: "With another key the clients of a killed edge wait until their connections time out.",
};
/// All secrets of fixed length.
pub const SECRETS: [SecretFile; 5] =
    [OPAQUE_SETUP, DELIVERY_KEY, TICKET_KEYS, TOKEN_KEY, RESET_KEY];

/// The file with the keys that seal stored data of accounts. Each rotation makes it longer. A
/// directory of a release before this file existed may lack it ([`ClusterDir::open`] does not
/// require it).
pub const AT_REST_KEYS: &str = "at-rest-keys";
/// The damage if the keys at rest are lost, as a sentence for people.
pub const AT_REST_KEYS_IF_LOST: &str =
    "Without it the recovery bundles that were stored so far can no longer be read.";

/// The certificate chain, in DER or PEM.
pub const CERTIFICATE: &str = "server-cert.der";
/// The certificate's private key, in DER or PEM.
pub const CERTIFICATE_KEY: &str = "server-key.der";
/// The file with the [`ClusterId`].
pub const CLUSTER_ID: &str = "cluster-id";

/// A complete directory of shared secrets.
#[derive(Clone, Debug)]
pub struct ClusterDir(DataDir);

/// The id of a cluster, not secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClusterId([u8; 16]);

/// The error for a text that is not 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cluster id has 32 hexadecimal digits, in lower case")]
pub struct ParseClusterIdError;

/// The reason why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterDirError {
    #[error(
        "there is no directory {path}. For a new cluster, create it with `qpq-admin init --out \
         {path}`; for an existing cluster, copy its directory here from another edge or a backup"
    )]
    NoDirectory { path: PathBuf },
    #[error(
        "{path} is missing. All edges share the directory that `qpq-admin init` created: copy all \
         of it here from another edge or a backup"
    )]
    Missing { path: PathBuf },
    #[error(
        "{path} is damaged: it has {found} bytes instead of {expected}. All edges share the \
         directory that `qpq-admin init` created: copy this file from another edge or a backup. {if_lost}"
    )]
    Damaged { path: PathBuf, found: usize, expected: usize, if_lost: &'static str },
    #[error(
        "{path} is damaged: {source}. All edges share the directory that `qpq-admin init` created: \
         copy this file from another edge or a backup"
    )]
    Id { path: PathBuf, source: ParseClusterIdError },
    #[error("{path} cannot be read: {source}. It must belong to the user that the server runs as")]
    Read { path: PathBuf, source: io::Error },
}

impl ClusterDir {
    /// Opens the directory at `path` and checks that all its files exist.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, ClusterDirError> {
        let path = path.into();
        if !path.is_dir() {
            return Err(ClusterDirError::NoDirectory { path });
        }
        let secrets = SECRETS.iter().map(|file| file.name);
        for name in secrets.chain([CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID]) {
            let path = path.join(name);
            match path.try_exists() {
                Ok(true) => {}
                Ok(false) => return Err(ClusterDirError::Missing { path }),
                Err(source) => return Err(ClusterDirError::Read { path, source }),
            }
        }
        Ok(Self(DataDir(path)))
    }

    /// Returns the path of the file `name`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns the secret in `file`.
    pub fn secret(&self, file: SecretFile) -> Result<Zeroizing<Vec<u8>>, ClusterDirError> {
        // Access by the group is allowed: Kubernetes makes the files of a Secret readable for a
        // group of the server's user.
        let missing = || ClusterDirError::Missing { path: self.file(file.name) };
        self.0
            .read(file, OTHERS)
            .map_err(|error| self.failed(file.name, error))?
            .ok_or_else(missing)
    }

    /// Returns the contents of the file `name`, which may have any length, if the file exists.
    pub fn read_any(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, ClusterDirError> {
        self.0.read_with_mode(name, OTHERS).map_err(|error| self.failed(name, error))
    }

    fn failed(&self, name: &str, error: DataDirError) -> ClusterDirError {
        match error {
            DataDirError::Damaged { path, found, expected, if_lost } => {
                ClusterDirError::Damaged { path, found, expected, if_lost }
            }
            DataDirError::Read { path, source } => ClusterDirError::Read { path, source },
            other => {
                ClusterDirError::Read { path: self.file(name), source: io::Error::other(other) }
            }
        }
    }

    pub fn cluster_id(&self) -> Result<ClusterId, ClusterDirError> {
        let path = self.file(CLUSTER_ID);
        let text = fs::read(&path)
            .map_err(|source| ClusterDirError::Read { path: path.clone(), source })?;
        let text = String::from_utf8_lossy(&text);
        text.trim_end().parse().map_err(|source| ClusterDirError::Id { path, source })
    }

    /// Replaces the secret in `file` atomically, with mode 0600.
    pub fn replace(&self, file: SecretFile, secret: &[u8]) -> Result<(), DataDirError> {
        self.0.replace(file.name, secret)
    }

    /// Replaces the file `name` atomically, with mode 0600.
    pub fn replace_any(&self, name: &str, contents: &[u8]) -> Result<(), DataDirError> {
        self.0.replace(name, contents)
    }

    /// Writes the file `name` with mode 0600, unless it exists.
    pub fn add(&self, name: &str, contents: &[u8]) -> Result<(), DataDirError> {
        self.0.add(name, contents)
    }
}

impl ClusterId {
    /// Creates an id from 16 random bytes.
    pub fn new(random: [u8; 16]) -> Self {
        Self(random)
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for ClusterId {
    type Err = ParseClusterIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_hex =
            text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = u128::from_str_radix(text, 16).map_err(|_| ParseClusterIdError)?;
        if is_hex { Ok(Self(number.to_be_bytes())) } else { Err(ParseClusterIdError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete_directory() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in SECRETS {
            fs::write(dir.path().join(file.name), vec![7; file.length]).unwrap();
        }
        for name in [CERTIFICATE, CERTIFICATE_KEY] {
            fs::write(dir.path().join(name), "whatever").unwrap();
        }
        fs::write(dir.path().join(CLUSTER_ID), format!("{}\n", ClusterId::new([1; 16]))).unwrap();
        dir
    }

    #[test]
    fn a_complete_directory_is_read() {
        let dir = complete_directory();
        let cluster = ClusterDir::open(dir.path()).unwrap();
        assert_eq!(*cluster.secret(TICKET_KEYS).unwrap(), [7; 96]);
        assert_eq!(cluster.cluster_id().unwrap(), ClusterId::new([1; 16]));
        cluster.replace(TICKET_KEYS, &[8; 96]).unwrap();
        assert_eq!(*cluster.secret(TICKET_KEYS).unwrap(), [8; 96]);
    }

    #[test]
    fn the_error_names_a_missing_file_and_qpq_admin_init() {
        let dir = complete_directory();
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(names.len(), 8);
        for path in names {
            let away = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            let message = ClusterDir::open(dir.path()).unwrap_err().to_string();
            assert!(message.starts_with(&format!("{} is missing", path.display())), "{message}");
            assert!(message.contains("qpq-admin init"), "{message}");
            fs::write(&path, away).unwrap();
        }
        let message = ClusterDir::open(dir.path().join("none")).unwrap_err().to_string();
        assert!(
            message.contains("there is no directory") && message.contains("qpq-admin init --out"),
            "{message}"
        );
    }

    #[test]
    fn the_error_names_a_damaged_file_and_the_remedy() {
        let dir = complete_directory();
        let cluster = ClusterDir::open(dir.path()).unwrap();
        for file in SECRETS {
            fs::write(cluster.file(file.name), b"short").unwrap();
            let message = cluster.secret(file).unwrap_err().to_string();
            let expected = format!(
                "{} is damaged: it has 5 bytes instead of",
                cluster.file(file.name).display()
            );
            assert!(
                message.starts_with(&expected) && message.contains("qpq-admin init"),
                "{message}"
            );
        }
        for bad in
            ["", "01", "0101010101010101010101010101010G", "+1010101010101010101010101010101"]
        {
            fs::write(cluster.file(CLUSTER_ID), bad).unwrap();
            let message = cluster.cluster_id().unwrap_err().to_string();
            assert!(
                message.contains("cluster-id is damaged") && message.contains("qpq-admin init"),
                "{message}"
            );
        }
    }
}
