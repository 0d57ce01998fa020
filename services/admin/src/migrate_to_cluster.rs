//! `qpq-admin migrate-to-cluster`: transfers all data of a single node into a cluster.
//!
//! 1. The data directory is claimed, so that no server starts on it. All rows are read and hashed.
//! 2. The cluster is checked: it has the node's secrets, and no other accounts of the same names.
//! 3. The rows are copied to import tables in the cluster's Postgres, starting where an earlier run
//!    stopped.
//! 4. The hashes of the copied rows are compared. One transaction then makes the rows part of the
//!    cluster.
//! 5. The data directory is marked as moved, so that no server starts on it again.
//!
//! Blobs are left out: their bytes are in files of the data directory. The output says how many.
//!
//! The transfer may be interrupted at any point. Another run repeats the steps and skips the work
//! that is done.

mod progress;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use qpq_ports::transfer::{Digests, Table};
use qpq_rpc::AtRestKeys;
use qpq_runtime::data_dir::{
    DataDir, SecretFile,
    cluster::{
        AT_REST_KEYS, AT_REST_KEYS_IF_LOST, ClusterDir, ClusterId, DELIVERY_KEY, OPAQUE_SETUP,
    },
};
use qpq_store_cluster::Import;
use qpq_store_embedded::{Export, TRANSFERRED_FILE};

use crate::{
    block_on, print,
    settings::{self, ClusterSettings, connect_with_retry},
};
use progress::Progress;

/// The arguments of `migrate-to-cluster`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data directory of the single node. Its server must be stopped.
    #[arg(long, value_name = "DATA_DIR")]
    from: PathBuf,
    #[command(flatten)]
    settings: settings::Location,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let settings = args.settings.load()?;
    let shared = ClusterDir::open(settings.secrets_dir()?)?;
    let from = args.from.as_path();
    let cluster = shared.cluster_id()?;
    let transferred = block_on(transfer(from, &settings, &shared))?;
    let Some((digests, blobs)) = transferred else {
        return print(format_args!(
            "{} was already moved into this cluster ({cluster}): nothing is left to do\n",
            from.display()
        ));
    };
    print(format_args!(
        "moved {from} into the cluster {cluster}: {rows} rows, with equal counts and hashes on \
         both sides\n{digests}\
         {from} is marked as moved: no server starts on it again. Keep it until you have a backup \
         of the cluster.\n{left_out}",
        from = from.display(),
        rows = digests.rows(),
        left_out = match blobs {
            0 => String::new(),
            _ => format!(
                "{blobs} blobs (the files of messages) were not moved: recipients who have not \
                 downloaded them cannot do so any more, and their senders can send them again.\n"
            ),
        },
    ))
}

/// Transfers the data of `from`. Returns its hashes and the number of blobs, which are left out;
/// `None` if an earlier run has transferred all of it.
async fn transfer(
    from: &Path,
    settings: &ClusterSettings,
    shared: &ClusterDir,
) -> anyhow::Result<Option<(Digests, u64)>> {
    let mut export = Export::open(from).await?;
    let cluster = shared.cluster_id()?;
    if let Some(note) = export.transferred()? {
        ensure!(
            note.contains(&cluster.to_string()),
            "{} was moved into another cluster than this one ({cluster}): {}. Use the \
             configuration of that cluster",
            from.display(),
            note.lines().next().unwrap_or_default()
        );
        return Ok(None);
    }
    let opaque_setup = compare_secrets(from, shared)?;
    let database = settings.database(opaque_setup)?;
    let connect = async || Import::connect(&database).await;
    let mut import = connect_with_retry(database.start_timeout, connect).await?;
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
    let blobs = export.blobs().await?;
    mark(from, cluster, &digests)?;
    Ok(Some((digests, blobs)))
}

/// Checks that the cluster has the node's secrets. Returns the fingerprint of the OPAQUE setup.
///
/// With other secrets, accounts of the node could not log in at the cluster, and clients could not
/// verify delivery proofs of the node.
fn compare_secrets(from: &Path, shared: &ClusterDir) -> anyhow::Result<[u8; 32]> {
    let node = DataDir::create(from)?;
    let secret = |file: SecretFile| {
        let missing = || format!("{} is missing. {}", from.join(file.name).display(), file.if_lost);
        node.read_secret(file)?.with_context(missing)
    };
    for file in [OPAQUE_SETUP, DELIVERY_KEY] {
        if secret(file)? != shared.secret(file)? {
            bail!(
                "{} differs from {}. {} Create the cluster's directory from the node's: \
                 `qpq-admin init --out DIR --from {}`",
                from.join(file.name).display(),
                shared.file(file.name).display(),
                file.if_lost,
                from.display()
            );
        }
    }
    compare_at_rest_keys(&node, shared)?;
    Ok(OPAQUE_SETUP.fingerprint(&secret(OPAQUE_SETUP)?))
}

/// Checks that the cluster has the node's keys at rest. The cluster may have further ones.
fn compare_at_rest_keys(node: &DataDir, shared: &ClusterDir) -> anyhow::Result<()> {
    let Some(file) = node.read_any(AT_REST_KEYS)? else { return Ok(()) };
    let path = node.path().join(AT_REST_KEYS);
    let cannot = || format!("{} is damaged. {AT_REST_KEYS_IF_LOST}", path.display());
    let node_keys = AtRestKeys::parse(&file).with_context(cannot)?;
    let shared_keys = match shared.read_any(AT_REST_KEYS)? {
        Some(file) => Some(
            AtRestKeys::parse(&file)
                .with_context(|| format!("{} is damaged", shared.file(AT_REST_KEYS).display()))?,
        ),
        None => None,
    };
    let has = |key| shared_keys.as_ref().is_some_and(|keys| keys.contains(key));
    ensure!(
        node_keys.ids().all(has),
        "{} does not contain the keys of {}. {AT_REST_KEYS_IF_LOST} Create the cluster's directory \
         from the node's: `qpq-admin init --out DIR --from {}`",
        shared.file(AT_REST_KEYS).display(),
        path.display(),
        node.path().display()
    );
    Ok(())
}

/// Fails if the cluster has another account with the name or key of an account of the node.
async fn check_names(export: &mut Export, import: &mut Import) -> anyhow::Result<()> {
    let mut accounts = export.rows(Table::Account, None).await?;
    while let Some(last) = accounts.last() {
        import.check(&accounts).await?;
        let key = last[..Table::Account.key().len()].to_vec();
        accounts = export.rows(Table::Account, Some(&key)).await?;
    }
    Ok(())
}

/// Copies rows to the import tables, except those that an earlier run has copied.
async fn copy(export: &mut Export, import: &mut Import, digests: &Digests) -> anyhow::Result<()> {
    let mut progress = Progress::new("transferred").of(digests.rows());
    for table in Table::ALL {
        let (mut last, copied) = import.position(table).await?;
        progress.rows(copied);
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

/// Marks the data directory as moved.
fn mark(from: &Path, cluster: ClusterId, digests: &Digests) -> anyhow::Result<()> {
    let note = format!("moved into the cluster {cluster}, with these rows and hashes:\n{digests}");
    DataDir::create(from)?.add(TRANSFERRED_FILE, note.as_bytes()).with_context(|| {
        format!(
            "all data was moved, but {} cannot be marked as moved: check the disk, then run this again",
            from.display()
        )
    })
}
