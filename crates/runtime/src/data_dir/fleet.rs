//! The directory that all edges of a cluster share: made once by `qpq-admin init`, the same on
//! every edge, only read here.
//!
//! | file | what | rotated |
//! |---|---|---|
//! | `opaque-setup.bin` | what passwords are checked with | never: every account depends on it |
//! | `delivery-key.bin` | signs delivery proofs | never: proofs are checked against it |
//! | `ticket-keys` | TLS session tickets: previous, current and next key | `qpq-admin rotate-ticket-keys`, every 6 hours; edges see it by themselves |
//! | `token-key` | Retry tokens: previous, current and next key | `qpq-admin rotate-token-key`; edges see it by themselves |
//! | `reset-key` | stateless resets | by replacing the file and restarting the edges one after the other |
//! | `server-cert.der`, `server-key.der` | the certificate and its key, in DER or PEM | by replacing both; edges see it by themselves |
//! | `cluster-id` | 32 hexadecimal digits; no secret | never |
//!
//! `cluster-id` is written last: a directory without it was not finished.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use zeroize::Zeroizing;

use super::{DataDir, DataDirError, OTHERS, SecretFile};

/// What passwords are checked with.
pub const OPAQUE_SETUP: SecretFile = SecretFile {
    name: "opaque-setup.bin",
    length: 128,
    if_lost: "Without it no account can log in again.",
};
/// What delivery proofs are signed with.
pub const DELIVERY_KEY: SecretFile = SecretFile {
    name: "delivery-key.bin",
    length: 32,
    if_lost: "Without it the delivery proofs signed so far can no longer be checked against this server.",
};
/// A ring of three keys for TLS session tickets.
pub const TICKET_KEYS: SecretFile = SecretFile {
    name: "ticket-keys",
    length: 96,
    if_lost: "With other keys clients make one full handshake more.",
};
/// A ring of three keys for the tokens by which clients prove their address.
pub const TOKEN_KEY: SecretFile = SecretFile {
    name: "token-key",
    length: 96,
    if_lost: "With other keys clients that are connecting try again.",
};
/// What stateless resets are made with.
pub const RESET_KEY: SecretFile = SecretFile {
    name: "reset-key",
    length: 32,
    if_lost: "With another key clients of edges that died wait until their connections time out.",
};
/// All of fixed length.
pub const SECRETS: [SecretFile; 5] =
    [OPAQUE_SETUP, DELIVERY_KEY, TICKET_KEYS, TOKEN_KEY, RESET_KEY];

/// The certificate chain, in DER or PEM.
pub const CERTIFICATE: &str = "server-cert.der";
/// The certificate's private key, in DER or PEM.
pub const CERTIFICATE_KEY: &str = "server-key.der";
/// What tells this cluster from others.
pub const CLUSTER_ID: &str = "cluster-id";

/// A finished directory.
#[derive(Clone, Debug)]
pub struct FleetDir(DataDir);

/// A cluster's name among others, of no secrecy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClusterId([u8; 16]);

/// The text is not 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cluster id has 32 hexadecimal digits, in lower case")]
pub struct ParseClusterIdError;

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FleetDirError {
    #[error(
        "there is no directory {path}. `qpq-admin init --out {path}` makes one for a new cluster; for one that exists, bring \
         the directory here that it was made with, the same to every edge"
    )]
    NoDirectory { path: PathBuf },
    #[error(
        "{path} is missing. All edges share the directory that `qpq-admin init` made: bring it here whole, from another edge \
         or a backup"
    )]
    Missing { path: PathBuf },
    #[error(
        "{path} is damaged: it has {found} bytes instead of {expected}. All edges share the directory that `qpq-admin init` \
         made: bring this file from another edge or a backup. {if_lost}"
    )]
    Damaged { path: PathBuf, found: usize, expected: usize, if_lost: &'static str },
    #[error(
        "{path} is damaged: {source}. All edges share the directory that `qpq-admin init` made: bring this file from another \
         edge or a backup"
    )]
    Id { path: PathBuf, source: ParseClusterIdError },
    #[error("{path} cannot be read: {source}. It must belong to the user that the server runs as")]
    Read { path: PathBuf, source: io::Error },
}

impl FleetDir {
    /// The directory at `path`, if all its files are there.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, FleetDirError> {
        let path = path.into();
        if !path.is_dir() {
            return Err(FleetDirError::NoDirectory { path });
        }
        let secrets = SECRETS.iter().map(|file| file.name);
        for name in secrets.chain([CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID]) {
            let path = path.join(name);
            match path.try_exists() {
                Ok(true) => {}
                Ok(false) => return Err(FleetDirError::Missing { path }),
                Err(source) => return Err(FleetDirError::Read { path, source }),
            }
        }
        Ok(Self(DataDir(path)))
    }

    /// Where a file is.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The secret in `file`.
    pub fn secret(&self, file: SecretFile) -> Result<Zeroizing<Vec<u8>>, FleetDirError> {
        // Kubernetes gives the files of a Secret to a group, of which the server's user is made a
        // member.
        match self.0.read(file, OTHERS) {
            Ok(Some(secret)) => Ok(secret),
            Ok(None) => Err(FleetDirError::Missing { path: self.file(file.name) }),
            Err(DataDirError::Damaged { path, found, expected, if_lost }) => {
                Err(FleetDirError::Damaged { path, found, expected, if_lost })
            }
            Err(DataDirError::Read { path, source }) => Err(FleetDirError::Read { path, source }),
            Err(other) => Err(FleetDirError::Read {
                path: self.file(file.name),
                source: io::Error::other(other),
            }),
        }
    }

    pub fn cluster_id(&self) -> Result<ClusterId, FleetDirError> {
        let path = self.file(CLUSTER_ID);
        let text =
            fs::read(&path).map_err(|source| FleetDirError::Read { path: path.clone(), source })?;
        let text = String::from_utf8_lossy(&text);
        text.trim_end().parse().map_err(|source| FleetDirError::Id { path, source })
    }

    /// Puts another secret in the place of `file`, at once or not at all, for its owner alone.
    pub fn replace(&self, file: SecretFile, secret: &[u8]) -> Result<(), DataDirError> {
        self.0.replace(file.name, secret)
    }
}

impl ClusterId {
    /// Of 16 random bytes.
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

    fn whole() -> tempfile::TempDir {
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
    fn a_whole_directory_is_read() {
        let dir = whole();
        let fleet = FleetDir::open(dir.path()).unwrap();
        assert_eq!(*fleet.secret(TICKET_KEYS).unwrap(), [7; 96]);
        assert_eq!(fleet.cluster_id().unwrap(), ClusterId::new([1; 16]));
        fleet.replace(TICKET_KEYS, &[8; 96]).unwrap();
        assert_eq!(*fleet.secret(TICKET_KEYS).unwrap(), [8; 96]);
    }

    #[test]
    fn every_missing_file_is_named_with_what_to_do() {
        let dir = whole();
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(names.len(), 8);
        for path in names {
            let away = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            let said = FleetDir::open(dir.path()).unwrap_err().to_string();
            assert!(said.starts_with(&format!("{} is missing", path.display())), "{said}");
            assert!(said.contains("qpq-admin init"), "{said}");
            fs::write(&path, away).unwrap();
        }
        let said = FleetDir::open(dir.path().join("none")).unwrap_err().to_string();
        assert!(
            said.contains("there is no directory") && said.contains("qpq-admin init --out"),
            "{said}"
        );
    }

    #[test]
    fn damaged_files_are_named_with_what_to_do() {
        let dir = whole();
        let fleet = FleetDir::open(dir.path()).unwrap();
        for file in SECRETS {
            fs::write(fleet.file(file.name), b"short").unwrap();
            let said = fleet.secret(file).unwrap_err().to_string();
            let expected = format!(
                "{} is damaged: it has 5 bytes instead of",
                fleet.file(file.name).display()
            );
            assert!(said.starts_with(&expected) && said.contains("qpq-admin init"), "{said}");
        }
        for bad in
            ["", "01", "0101010101010101010101010101010G", "+1010101010101010101010101010101"]
        {
            fs::write(fleet.file(CLUSTER_ID), bad).unwrap();
            let said = fleet.cluster_id().unwrap_err().to_string();
            assert!(
                said.contains("cluster-id is damaged") && said.contains("qpq-admin init"),
                "{said}"
            );
        }
    }
}
