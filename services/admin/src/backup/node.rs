//! Backing up a single server, also while it runs.

use std::path::Path;

use anyhow::{Context as _, ensure};
use qpq_ports::{Clock as _, SystemClock};
use qpq_runtime::data_dir::cluster::{CERTIFICATE, CERTIFICATE_KEY, DELIVERY_KEY, OPAQUE_SETUP};
use qpq_server::Config;
use qpq_store_embedded::{DATABASE_FILE, copy_database, inspect};

use super::{
    manifest::{FORMAT, Kind, Manifest, utc},
    unfinished::Unfinished,
};

/// What a server cannot do without. Its certificate and key may be elsewhere.
pub(super) const SECRETS: [&str; 2] = [OPAQUE_SETUP.name, DELIVERY_KEY.name];
pub(super) const CERTIFICATES: [&str; 2] = [CERTIFICATE, CERTIFICATE_KEY];

/// Copies everything in `data_dir` that cannot be created anew.
pub(super) async fn back_up(data_dir: &Path, target: &Unfinished) -> anyhow::Result<Manifest> {
    let taken_at = utc(SystemClock.now().0 / 1_000);
    let database = target.path().join(DATABASE_FILE);
    copy_database(data_dir, &database).await?;
    let inspected = inspect(&database)
        .await
        .context("the copy of the database is not usable. Nothing of the backup was kept")?;
    let mut parts = vec![target.measure(DATABASE_FILE)?];
    // After the database: they do not change, and a certificate that was renewed meanwhile is the
    // better one.
    for name in SECRETS {
        let path = data_dir.join(name);
        ensure!(
            path.exists(),
            "{} is missing, and without it nothing of this could be used: nothing was backed up",
            path.display()
        );
        parts.push(target.copy(&path, name)?);
    }
    let certificates = CERTIFICATES.map(|name| data_dir.join(name));
    if certificates.iter().all(|path| path.exists()) {
        for name in CERTIFICATES {
            parts.push(target.copy(&data_dir.join(name), name)?);
        }
    }
    Ok(Manifest {
        format: FORMAT,
        kind: Kind::SingleNode,
        qpq_version: env!("CARGO_PKG_VERSION").into(),
        taken_at,
        store_id: inspected.store_id.unwrap_or_default(),
        schema: inspected.schema,
        rows: inspected.rows.into_iter().collect(),
        parts,
    })
}

/// What the configuration has elsewhere and the backup does not hold, as a line for the operator.
pub(super) fn left_out(config: &Config) -> Option<String> {
    let named: Vec<_> = [("tls.cert", &config.tls.cert), ("tls.key", &config.tls.key)]
        .into_iter()
        .filter_map(|(setting, path)| Some(format!("{} ({setting})", path.as_ref()?.display())))
        .collect();
    (!named.is_empty()).then(|| {
        format!("Not in it, because they are not in the data directory: {}.\n", named.join(", "))
    })
}
