//! The files of a cluster in a directory: written in order, then loaded as an edge loads them, and
//! only then marked as complete.

use std::{
    ffi::OsStr,
    fmt, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use qpq_rpc::{AtRestKeys, OpaqueServer};
use qpq_runtime::data_dir::{
    DataDir, DataDirError, SecretFile,
    cluster::{
        AT_REST_KEYS, CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID, ClusterDir, ClusterDirError,
        ClusterId, DELIVERY_KEY, OPAQUE_SETUP, RESET_KEY, SECRETS, TICKET_KEYS, TOKEN_KEY,
    },
};
use qpq_transport::{
    ClusterKeyFiles, ClusterKeys, ClusterKeysError, Fingerprint, Identity, IdentityError,
};

use super::contents::{Contents, File, Origin};

/// A summary of a directory for the operator.
#[derive(Debug)]
pub(super) struct Summary {
    cluster: ClusterId,
    fingerprint: Fingerprint,
    opaque: [u8; 32],
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  cluster       {}", self.cluster)?;
        writeln!(f, "  opaque setup  {}", hex::encode(self.opaque))?;
        writeln!(
            f,
            "  fingerprint   {}   (of the certificate, for clients to pin)",
            self.fingerprint
        )
    }
}

/// The reason why a directory was not created, or not completely.
#[derive(Debug, thiserror::Error)]
pub(super) enum InitError {
    #[error(
        "{0} already contains the secrets of a cluster, and nothing is overwritten. Use them, or \
         name another directory with --out"
    )]
    Complete(PathBuf),
    #[error(
        "{0} is not one of a cluster's files: name an empty directory, or a new one, with --out"
    )]
    Foreign(PathBuf),
    #[error(
        "{0} already exists and differs from the file to copy, and nothing is overwritten. Remove \
         it, or name another directory with --out"
    )]
    Conflict(PathBuf),
    #[error(
        "{key} exists without {cert}, and nothing is overwritten. Restore the certificate, or \
         remove the key"
    )]
    OrphanKey { cert: PathBuf, key: PathBuf },
    #[error("{path} cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the permissions of {path} cannot be restricted: {source}. Run this as its owner")]
    Restrict { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Write(#[from] DataDirError),
    #[error(transparent)]
    Incomplete(#[from] ClusterDirError),
    #[error("{0}")]
    Keys(#[from] ClusterKeysError),
    #[error("the certificate: {0}")]
    Certificate(#[from] IdentityError),
    #[error("{path} cannot be used: {source}")]
    Opaque { path: PathBuf, source: qpq_rpc::opaque::InvalidSetup },
    #[error("{path} cannot be used: {source}")]
    AtRest { path: PathBuf, source: qpq_rpc::at_rest::InvalidAtRestKeys },
}

/// Returns whether a run of `init` has completed the directory.
pub(super) fn is_complete(dir: &Path) -> bool {
    dir.join(CLUSTER_ID).exists()
}

/// Checks that the directory has no other files, and restricts it to its owner.
pub(super) fn prepare(dir: &Path) -> Result<(), InitError> {
    if is_complete(dir) {
        return Err(InitError::Complete(dir.to_owned()));
    }
    DataDir::create(dir)?;
    let failed = |source| InitError::Read { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !is_expected(&entry.file_name()) {
            return Err(InitError::Foreign(entry.path()));
        }
    }
    let mode = fs::metadata(dir).map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
            .map_err(|source| InitError::Restrict { path: dir.to_owned(), source })?;
    }
    Ok(())
}

/// Returns whether a name may be in the directory of an interrupted run.
///
/// Expected are the files of a cluster, their temporary files, and the directory that file systems
/// create in an empty volume.
fn is_expected(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let files = SECRETS.iter().map(|file| file.name);
    let files = files.chain([AT_REST_KEYS, CERTIFICATE, CERTIFICATE_KEY]);
    name == "lost+found"
        || files.chain([CLUSTER_ID]).any(|file| {
            name.strip_prefix(file).is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('.') && rest.ends_with(".new")
            })
        })
}

/// Writes the files that do not exist yet. Concurrent runs do not overwrite each other's files.
pub(super) fn write(dir: &Path, contents: &Contents) -> Result<Summary, InitError> {
    let data = DataDir::create(dir)?;
    for file in &contents.secrets {
        put(&data, file)?;
    }
    put_pair(&data, contents)?;
    check(dir)?;
    put(&data, &contents.cluster_id)?;
    verify(dir)
}

/// Writes a file unless it exists. An existing file must equal the file to copy.
fn put(dir: &DataDir, file: &File) -> Result<(), InitError> {
    let path = dir.path().join(file.name);
    dir.add(file.name, &file.bytes)?;
    let found = fs::read(&path).map_err(|source| InitError::Read { path: path.clone(), source })?;
    if file.origin == Origin::Copied && found != *file.bytes {
        return Err(InitError::Conflict(path));
    }
    Ok(())
}

/// Writes the certificate, then its key.
///
/// A certificate without a key is from an interrupted run and is replaced. A key without a
/// certificate may be the only copy of an operator's key and is never replaced.
fn put_pair(dir: &DataDir, contents: &Contents) -> Result<(), InitError> {
    let (cert, key) = (dir.path().join(CERTIFICATE), dir.path().join(CERTIFICATE_KEY));
    match (cert.exists(), key.exists()) {
        (true, true) if contents.certificate.origin == Origin::Generated => return Ok(()),
        (false, true) => return Err(InitError::OrphanKey { cert, key }),
        (true, false) => dir.replace(CERTIFICATE, &contents.certificate.bytes)?,
        _ => {}
    }
    put(dir, &contents.certificate)?;
    put(dir, &contents.certificate_key)
}

/// Loads a complete directory as an edge does.
pub(super) fn verify(dir: &Path) -> Result<Summary, InitError> {
    let cluster = ClusterDir::open(dir)?.cluster_id()?;
    let (fingerprint, opaque) = check(dir)?;
    Ok(Summary { cluster, fingerprint, opaque })
}

/// Checks that all files except the cluster's id can be used.
///
/// Returns the fingerprints of the certificate and of the OPAQUE setup.
fn check(dir: &Path) -> Result<(Fingerprint, [u8; 32]), InitError> {
    let data = DataDir::create(dir)?;
    let secret = |file: SecretFile| {
        let missing = || ClusterDirError::Missing { path: dir.join(file.name) };
        data.read_secret(file)?.ok_or_else(missing).map_err(InitError::from)
    };
    let setup = secret(OPAQUE_SETUP)?;
    OpaqueServer::parse(&setup)
        .map_err(|source| InitError::Opaque { path: dir.join(OPAQUE_SETUP.name), source })?;
    secret(DELIVERY_KEY)?;
    let path = dir.join(AT_REST_KEYS);
    let missing = || ClusterDirError::Missing { path: path.clone() };
    let at_rest = data.read_any(AT_REST_KEYS)?.ok_or_else(missing)?;
    AtRestKeys::parse(&at_rest).map_err(|source| InitError::AtRest { path, source })?;
    ClusterKeys::load(ClusterKeyFiles {
        tickets: dir.join(TICKET_KEYS.name),
        tokens: dir.join(TOKEN_KEY.name),
        reset: dir.join(RESET_KEY.name),
    })?;
    let identity = Identity::load(&dir.join(CERTIFICATE), &dir.join(CERTIFICATE_KEY))?;
    Ok((identity.fingerprint(), OPAQUE_SETUP.fingerprint(&setup)))
}
