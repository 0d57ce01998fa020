//! Verification of a backup: every part is unchanged and can be used.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use qpq_rpc::{AtRestKeys, OpaqueServer};
use qpq_runtime::data_dir::cluster::{AT_REST_KEYS, ClusterDir, DELIVERY_KEY, OPAQUE_SETUP};
use qpq_store_embedded::{DATABASE_FILE, blob_files, inspect};
use qpq_transport::Identity;

use super::{
    cluster,
    manifest::{MANIFEST, MANIFEST_HASH, Manifest, Part, StoreKind},
    node::{CERTIFICATES, SECRETS, part_name},
    unfinished::digest,
};

/// Verifies the backup in `dir`. Returns its manifest.
pub(super) async fn check(dir: &Path) -> anyhow::Result<Manifest> {
    let manifest = Manifest::read(dir)?;
    for part in &manifest.parts {
        check_part(dir, part)?;
    }
    let unknown = unknown_files(dir, &manifest)?;
    ensure!(
        unknown.is_empty(),
        "{} contains files that are not part of the backup: {}. Move them to another directory",
        dir.display(),
        unknown.join(", ")
    );
    match manifest.kind {
        StoreKind::SingleNode => check_node(dir, &manifest).await?,
        StoreKind::Cluster => {
            check_setup(&dir.join(cluster::SHARED))?;
            ClusterDir::open(dir.join(cluster::SHARED))?.cluster_id()?;
            check_rows(dir, &manifest, &cluster::rows_in(&dir.join(cluster::DUMP)).await?)?;
        }
    }
    Ok(manifest)
}

fn check_part(dir: &Path, part: &Part) -> anyhow::Result<()> {
    let path = dir.join(&part.name);
    let (bytes, hash) = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{} is missing. Use another backup", path.display())
        }
        _ => digest(&path)?,
    };
    ensure!(
        bytes == part.bytes,
        "{} is damaged: it has {bytes} bytes instead of {}. Use another backup",
        path.display(),
        part.bytes
    );
    ensure!(
        hex::encode(hash) == part.sha256,
        "{} is damaged: its SHA-256 differs from the one in {MANIFEST}. Use another backup",
        path.display()
    );
    Ok(())
}

/// Returns the files that the manifest does not name.
fn unknown_files(dir: &Path, manifest: &Manifest) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(below) = directories.pop() {
        let path = dir.join(&below);
        let cannot = || format!("{} cannot be read", path.display());
        for entry in fs::read_dir(&path).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            let name = below.join(entry.file_name());
            if entry.file_type().with_context(cannot)?.is_dir() {
                directories.push(name);
                continue;
            }
            let is_known = [MANIFEST, MANIFEST_HASH].iter().any(|known| name == Path::new(known))
                || manifest.parts.iter().any(|part| name == Path::new(&part.name));
            if !is_known {
                found.push(name.display().to_string());
            }
        }
    }
    found.sort();
    Ok(found)
}

async fn check_node(dir: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    let named = |name: &str| manifest.parts.iter().any(|part| part.name == name);
    for name in SECRETS.into_iter().chain([DATABASE_FILE]) {
        ensure!(
            named(name),
            "{} does not name {name}. Use another backup",
            dir.join(MANIFEST).display()
        );
    }
    check_setup(dir)?;
    if CERTIFICATES.into_iter().all(named) {
        Identity::load(&dir.join(CERTIFICATES[0]), &dir.join(CERTIFICATES[1]))?;
    }
    let inspected = inspect(&dir.join(DATABASE_FILE)).await?;
    ensure!(
        inspected.schema == manifest.schema,
        "{} has schema {}, but {MANIFEST} has {}. Use another backup",
        dir.join(DATABASE_FILE).display(),
        inspected.schema,
        manifest.schema
    );
    check_blobs(dir, manifest).await?;
    check_rows(dir, manifest, &inspected.rows.into_iter().collect())
}

/// Checks that each blob of the database is a part with its hash. The parts were compared with the
/// manifest before.
async fn check_blobs(dir: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    let parts: HashMap<_, _> =
        manifest.parts.iter().map(|part| (part.name.as_str(), part)).collect();
    for file in blob_files(&dir.join(DATABASE_FILE)).await? {
        let part = parts.get(part_name(&file)?);
        ensure!(
            part.is_some_and(
                |part| part.bytes == file.bytes && part.sha256 == hex::encode(file.sha256)
            ),
            "the blob {} of the database is not part of the backup. Use another backup",
            file.path.display()
        );
    }
    Ok(())
}

fn check_rows(
    dir: &Path,
    manifest: &Manifest,
    found: &std::collections::BTreeMap<String, u64>,
) -> anyhow::Result<()> {
    ensure!(
        *found == manifest.rows,
        "the database in {} has other row counts than {MANIFEST}: {found:?} instead of {:?}. Use \
         another backup",
        dir.display(),
        manifest.rows
    );
    Ok(())
}

fn check_setup(dir: &Path) -> anyhow::Result<()> {
    for file in [OPAQUE_SETUP, DELIVERY_KEY] {
        let path = dir.join(file.name);
        let bytes =
            fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        ensure!(
            bytes.len() == file.length,
            "{} is damaged: it has {} bytes instead of {}. Use another backup",
            path.display(),
            bytes.len(),
            file.length
        );
        if file.name == OPAQUE_SETUP.name {
            OpaqueServer::parse(&bytes)
                .with_context(|| format!("{} cannot be used", path.display()))?;
        }
    }
    let path = dir.join(AT_REST_KEYS);
    if path.exists() {
        let bytes =
            fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        AtRestKeys::parse(&bytes)
            .with_context(|| format!("{} is damaged. Use another backup", path.display()))?;
    }
    Ok(())
}
