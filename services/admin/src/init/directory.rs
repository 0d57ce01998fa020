//! A cluster's files in a directory: written one after the other, looked at as an edge will look at
//! them, and only then finished.

use std::{
    ffi::OsStr,
    fmt, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use qpq_rpc::OpaqueServer;
use qpq_runtime::data_dir::{
    DataDir, DataDirError, SecretFile,
    cluster::{
        CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID, ClusterDir, ClusterDirError, ClusterId,
        DELIVERY_KEY, OPAQUE_SETUP, RESET_KEY, SECRETS, TICKET_KEYS, TOKEN_KEY,
    },
};
use qpq_transport::{
    ClusterKeyFiles, ClusterKeys, ClusterKeysError, Fingerprint, Identity, IdentityError,
};

use super::contents::{Contents, File, Origin};

/// What a directory holds, for the operator to see.
#[derive(Debug)]
pub(super) struct Made {
    cluster: ClusterId,
    fingerprint: Fingerprint,
    opaque: [u8; 32],
}

impl fmt::Display for Made {
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

/// Why nothing was made, or not all.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error(
        "{0} holds a cluster's secrets already, and nothing is overwritten. Use them, or name another directory with --out"
    )]
    Finished(PathBuf),
    #[error(
        "{0} is none of a cluster's files: name an empty directory, or one that is not there, with --out"
    )]
    Foreign(PathBuf),
    #[error(
        "{0} is there already and is another than was to be taken, and nothing is overwritten. Remove it, or name another \
         directory with --out"
    )]
    InTheWay(PathBuf),
    #[error(
        "{key} is there without {cert}, and nothing is overwritten. Restore the certificate, or remove the key"
    )]
    OrphanKey { cert: PathBuf, key: PathBuf },
    #[error("{path} cannot be looked at: {source}")]
    Look { path: PathBuf, source: io::Error },
    #[error("{path} cannot be kept from other users: {source}. Run this as its owner")]
    Tighten { path: PathBuf, source: io::Error },
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
}

/// Whether a run of `init` has come to its end here.
pub(super) fn is_finished(dir: &Path) -> bool {
    dir.join(CLUSTER_ID).exists()
}

/// Sees that nothing is in the way, and that nobody else can look.
pub(super) fn prepare(dir: &Path) -> Result<(), Refused> {
    if is_finished(dir) {
        return Err(Refused::Finished(dir.to_owned()));
    }
    DataDir::create(dir)?;
    let look = |source| Refused::Look { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(look)? {
        let entry = entry.map_err(look)?;
        if !is_ours(&entry.file_name()) {
            return Err(Refused::Foreign(entry.path()));
        }
    }
    let mode = fs::metadata(dir).map_err(look)?.permissions().mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
            .map_err(|source| Refused::Tighten { path: dir.to_owned(), source })?;
    }
    Ok(())
}

/// One of a cluster's files, or what a stopped run left of one; or what file systems put into an
/// empty volume.
fn is_ours(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let files = SECRETS.iter().map(|file| file.name).chain([CERTIFICATE, CERTIFICATE_KEY]);
    name == "lost+found"
        || files.chain([CLUSTER_ID]).any(|file| {
            name.strip_prefix(file).is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('.') && rest.ends_with(".new")
            })
        })
}

/// Writes what is not there yet. Of two that do so at a time neither overwrites the other's files.
pub(super) fn write(dir: &Path, contents: &Contents) -> Result<Made, Refused> {
    let data = DataDir::create(dir)?;
    for file in &contents.secrets {
        put(&data, file)?;
    }
    put_pair(&data, contents)?;
    check(dir)?;
    put(&data, &contents.cluster_id)?;
    verify(dir)
}

fn put(dir: &DataDir, file: &File) -> Result<(), Refused> {
    let path = dir.path().join(file.name);
    dir.add(file.name, &file.bytes)?;
    let there = fs::read(&path).map_err(|source| Refused::Look { path: path.clone(), source })?;
    if file.origin == Origin::Given && there != *file.bytes {
        return Err(Refused::InTheWay(path));
    }
    Ok(())
}

/// The certificate goes first, so that a run which is stopped between the two leaves nothing that
/// would be missed.
fn put_pair(dir: &DataDir, contents: &Contents) -> Result<(), Refused> {
    let (cert, key) = (dir.path().join(CERTIFICATE), dir.path().join(CERTIFICATE_KEY));
    match (cert.exists(), key.exists()) {
        (true, true) if contents.certificate.origin == Origin::Made => return Ok(()),
        (false, true) => return Err(Refused::OrphanKey { cert, key }),
        (true, false) => dir.replace(CERTIFICATE, &contents.certificate.bytes)?,
        _ => {}
    }
    put(dir, &contents.certificate)?;
    put(dir, &contents.certificate_key)
}

/// Reads a finished directory as an edge does.
pub(super) fn verify(dir: &Path) -> Result<Made, Refused> {
    let cluster = ClusterDir::open(dir)?.cluster_id()?;
    let (fingerprint, opaque) = check(dir)?;
    Ok(Made { cluster, fingerprint, opaque })
}

/// Whether all but the cluster's id can be used; how certificate and OPAQUE setup are told from
/// others.
fn check(dir: &Path) -> Result<(Fingerprint, [u8; 32]), Refused> {
    let data = DataDir::create(dir)?;
    let secret = |file: SecretFile| {
        let missing = || ClusterDirError::Missing { path: dir.join(file.name) };
        data.read_secret(file)?.ok_or_else(missing).map_err(Refused::from)
    };
    let setup = secret(OPAQUE_SETUP)?;
    OpaqueServer::parse(&setup)
        .map_err(|source| Refused::Opaque { path: dir.join(OPAQUE_SETUP.name), source })?;
    secret(DELIVERY_KEY)?;
    ClusterKeys::load(ClusterKeyFiles {
        tickets: dir.join(TICKET_KEYS.name),
        tokens: dir.join(TOKEN_KEY.name),
        reset: dir.join(RESET_KEY.name),
    })?;
    let identity = Identity::load(&dir.join(CERTIFICATE), &dir.join(CERTIFICATE_KEY))?;
    Ok((identity.fingerprint(), OPAQUE_SETUP.fingerprint(&setup)))
}
