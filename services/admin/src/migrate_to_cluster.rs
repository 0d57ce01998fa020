//! `qpq-admin migrate-to-cluster`: moves everything that an embedded node holds into a cluster.
//!
//! 1. The data directory is taken, so that no server starts on it, and read once: what it comes to
//!    is the measure of the rest.
//! 2. It must be this cluster's: made with the node's secrets, without other users of the same
//!    names.
//! 3. Its rows are laid out in the cluster's Postgres, from where an earlier run stopped.
//! 4. One transaction makes them part of the cluster, if they come to the same there.
//! 5. The data directory is marked, so that no server starts on it again.
//!
//! It may be stopped anywhere. Whoever runs it again comes through the same steps, and finds done
//! what was done.

mod progress;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use qpq_ports::transfer::{Digests, Table};
use qpq_runtime::data_dir::{
    DataDir, SecretFile,
    cluster::{ClusterDir, ClusterId, DELIVERY_KEY, OPAQUE_SETUP},
};
use qpq_store_cluster::Import;
use qpq_store_embedded::{Export, MOVED_FILE};

use crate::{
    block_on, say,
    settings::{self, Given, patiently},
};
use progress::Progress;

/// From where to where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data directory of the server that grows up. It must be stopped.
    #[arg(long, value_name = "DATA_DIR")]
    from: PathBuf,
    #[command(flatten)]
    settings: settings::Location,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let given = args.settings.load()?;
    let fleet = ClusterDir::open(given.secrets_dir()?)?;
    let from = args.from.as_path();
    let cluster = fleet.cluster_id()?;
    let moved = block_on(move_all(from, &given, &fleet))?;
    let Some(digests) = moved else {
        return say(format_args!(
            "{} was moved into this cluster already ({cluster}): nothing is left to do\n",
            from.display()
        ));
    };
    say(format_args!(
        "moved {from} into the cluster {cluster}: {rows} rows, in number and hash the same on both sides\n{digests}\
         {from} is marked as moved: no server starts on it again. Keep it until you have a backup of the cluster.\n",
        from = from.display(),
        rows = digests.rows(),
    ))
}

/// What was moved; `None` if it was before.
async fn move_all(
    from: &Path,
    given: &Given,
    fleet: &ClusterDir,
) -> anyhow::Result<Option<Digests>> {
    let mut export = Export::open(from).await?;
    let cluster = fleet.cluster_id()?;
    if let Some(note) = export.moved()? {
        ensure!(
            note.contains(&cluster.to_string()),
            "{} was moved into another cluster than this one ({cluster}): {}",
            from.display(),
            note.lines().next().unwrap_or_default()
        );
        return Ok(None);
    }
    let opaque_setup = compare_secrets(from, fleet)?;
    let database = given.database(opaque_setup)?;
    let connect = async || Import::connect(&database).await;
    let mut import = patiently(database.start_timeout, connect).await?;
    import.lock(database.start_timeout).await?;

    let mut progress = Progress::new("read");
    let digests = export.digests(|| progress.row()).await?;
    if !import.is_done(&digests).await? {
        check_names(&mut export, &mut import).await?;
        import.begin(&digests).await?;
        copy(&mut export, &mut import, &digests).await?;
        let mut progress = Progress::new("compared").of(digests.rows());
        import.finish(&digests, || progress.row()).await?;
    }
    import.close().await;
    mark(from, cluster, &digests)?;
    Ok(Some(digests))
}

/// Who registered with the node shall log in at the cluster, and what the node signed shall be
/// checked against it. The fingerprint of what they have in common.
fn compare_secrets(from: &Path, fleet: &ClusterDir) -> anyhow::Result<[u8; 32]> {
    let node = DataDir::create(from)?;
    let secret = |file: SecretFile| {
        let missing = || format!("{} is missing. {}", from.join(file.name).display(), file.if_lost);
        node.read_secret(file)?.with_context(missing)
    };
    for file in [OPAQUE_SETUP, DELIVERY_KEY] {
        if secret(file)? != fleet.secret(file)? {
            bail!(
                "{} is another than {}. {} Make the cluster's directory from the node's: `qpq-admin init --out DIR --from {}`",
                from.join(file.name).display(),
                fleet.file(file.name).display(),
                file.if_lost,
                from.display()
            );
        }
    }
    Ok(OPAQUE_SETUP.fingerprint(&secret(OPAQUE_SETUP)?))
}

async fn check_names(export: &mut Export, import: &mut Import) -> anyhow::Result<()> {
    let mut accounts = export.rows(Table::Account, None).await?;
    while let Some(last) = accounts.last() {
        import.check(&accounts).await?;
        let key = last[..Table::Account.key().len()].to_vec();
        accounts = export.rows(Table::Account, Some(&key)).await?;
    }
    Ok(())
}

async fn copy(export: &mut Export, import: &mut Import, digests: &Digests) -> anyhow::Result<()> {
    let mut progress = Progress::new("moved").of(digests.rows());
    for table in Table::ALL {
        let (mut last, there) = import.position(table).await?;
        progress.rows(there);
        loop {
            let rows = export.rows(table, last.as_deref()).await?;
            let Some(row) = rows.last() else { break };
            last = Some(row[..table.key().len()].to_vec());
            import.put(table, &rows).await?;
            progress.rows(rows.len() as u64);
        }
    }
    Ok(())
}

fn mark(from: &Path, cluster: ClusterId, digests: &Digests) -> anyhow::Result<()> {
    let note =
        format!("moved into the cluster {cluster}, with so many rows of such hashes:\n{digests}");
    DataDir::create(from)?.add(MOVED_FILE, note.as_bytes()).with_context(|| {
        format!(
            "everything was moved, but {} is not marked as moved: see to the disk, then run this again",
            from.display()
        )
    })
}
