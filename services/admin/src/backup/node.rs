//! Backup of a single node, also while its server runs.

use std::path::Path;

use anyhow::{Context as _, ensure};
use qpq_ports::{Clock as _, SystemClock};
use qpq_runtime::data_dir::cluster::{
    AT_REST_KEYS, CERTIFICATE, CERTIFICATE_KEY, DELIVERY_KEY, OPAQUE_SETUP,
};
use qpq_server::Config;
use qpq_store_embedded::{BlobFile, DATABASE_FILE, blob_files, copy_database, inspect};

use super::{
    manifest::{FORMAT, Manifest, StoreKind, utc},
    unfinished::UnfinishedBackup,
};

/// The files that every single node needs.
pub(super) const SECRETS: [&str; 2] = [OPAQUE_SETUP.name, DELIVERY_KEY.name];
/// The certificate and its key, which may also be in another directory.
pub(super) const CERTIFICATES: [&str; 2] = [CERTIFICATE, CERTIFICATE_KEY];

/// Copies all files in `data_dir` that cannot be created again.
pub(super) async fn back_up(
    data_dir: &Path,
    target: &UnfinishedBackup,
) -> anyhow::Result<Manifest> {
    let taken_at = utc(SystemClock.now().0 / 1_000);
    let database = target.path().join(DATABASE_FILE);
    copy_database(data_dir, &database).await?;
    let inspected = inspect(&database)
        .await
        .context("the copy of the database cannot be used. The backup was removed")?;
    let mut parts = vec![target.measure(DATABASE_FILE)?];
    // These files are copied after the database. Only a renewed certificate may change meanwhile,
    // and then the newer one is preferable.
    for name in SECRETS {
        let path = data_dir.join(name);
        ensure!(
            path.exists(),
            "{} is missing, and a backup without it cannot be used: no backup was created. Restore \
             the file from an earlier backup first",
            path.display()
        );
        parts.push(target.copy(&path, name)?);
    }
    let at_rest_keys = data_dir.join(AT_REST_KEYS);
    if at_rest_keys.exists() {
        parts.push(target.copy(&at_rest_keys, AT_REST_KEYS)?);
    } else {
        let sealed = inspected.rows.iter().find(|(table, _)| *table == "recovery_bundle");
        ensure!(
            sealed.is_none_or(|(_, rows)| *rows == 0),
            "{} is missing although there are recovery bundles, and a backup without it cannot be \
             used: no backup was created. Restore the file from an earlier backup first",
            at_rest_keys.display()
        );
    }
    let certificates = CERTIFICATES.map(|name| data_dir.join(name));
    if certificates.iter().all(|path| path.exists()) {
        for name in CERTIFICATES {
            parts.push(target.copy(&data_dir.join(name), name)?);
        }
    }
    // A server removes the file of a blob no sooner than an hour after its row, so the files of the
    // copied rows are there. The hashes are checked, because a part that differs is useless.
    for file in blob_files(&database).await? {
        let path = data_dir.join(&file.path);
        let part = target.copy(&path, part_name(&file)?).with_context(|| {
            format!(
                "the blob {} is missing or cannot be copied, and no backup was created. A backup \
                 that takes more than an hour must be repeated; otherwise check the disk",
                path.display()
            )
        })?;
        ensure!(
            part.bytes == file.bytes && part.sha256 == hex::encode(file.sha256),
            "the blob {} is damaged, and no backup was created: check the disk. Without the file, \
             the backup fails too, so restore it from an earlier backup",
            path.display()
        );
        parts.push(part);
    }
    Ok(Manifest {
        format: FORMAT,
        kind: StoreKind::SingleNode,
        qpq_version: env!("CARGO_PKG_VERSION").into(),
        taken_at,
        store_id: inspected.store_id.unwrap_or_default(),
        schema: inspected.schema,
        rows: inspected.rows.into_iter().collect(),
        parts,
    })
}

/// Returns the name of the part with the bytes of a blob.
pub(super) fn part_name(file: &BlobFile) -> anyhow::Result<&str> {
    file.path.to_str().with_context(|| format!("{} is not UTF-8", file.path.display()))
}

/// Returns a line that names the configured files that the backup does not contain.
pub(super) fn omitted_files(config: &Config) -> Option<String> {
    let named: Vec<_> = [("tls.cert", &config.tls.cert), ("tls.key", &config.tls.key)]
        .into_iter()
        .filter_map(|(setting, path)| Some(format!("{} ({setting})", path.as_ref()?.display())))
        .collect();
    (!named.is_empty()).then(|| {
        format!(
            "The backup does not contain files outside of the data directory: {}. Back them up too.\n",
            named.join(", ")
        )
    })
}
