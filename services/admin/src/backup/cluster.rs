//! Backup and restore of a cluster: of its database, with the client programs of Postgres, and of
//! the shared directory. Redis and NATS have no data that a backup needs.
//!
//! A restore is one transaction, which creates the tables and begins another history. Therefore a
//! killed restore leaves an empty database.

use std::{collections::BTreeMap, path::Path, process::Stdio};

use anyhow::{Context as _, bail, ensure};
use qpq_ports::{Clock as _, OldSessions, SystemClock};
use qpq_runtime::data_dir::cluster::{
    AT_REST_KEYS, CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID, ClusterDir, OPAQUE_SETUP, SECRETS,
};
use qpq_store_cluster::{BEGIN_HISTORY, Config, Operator, client_environment};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use super::{
    manifest::{FORMAT, Manifest, StoreKind, utc},
    postgres::{Program, as_sql, copied_table, damaged, dump},
    restore::Restored,
    unfinished::UnfinishedBackup,
};
use crate::settings::{ClusterSettings, connect_with_retry};

pub(super) const DUMP: &str = "postgres.dump";
pub(super) const SHARED: &str = "shared";

/// Copies the shared directory and dumps the database.
pub(super) async fn back_up(
    settings: &ClusterSettings,
    target: &UnfinishedBackup,
) -> anyhow::Result<Manifest> {
    let shared = ClusterDir::open(settings.secrets_dir()?)?;
    shared.cluster_id()?;
    let config = database(settings, &shared)?;
    let taken_at = utc(SystemClock.now().0 / 1_000);
    let connect = async || Operator::connect(&config).await;
    let mut operator = connect_with_retry(config.start_timeout, connect).await?;
    let snapshot = operator.snapshot().await?;
    let path = target.path().join(DUMP);
    dump(&client_environment(&config)?, &snapshot.name, &path).await?;
    drop(operator);
    let rows: BTreeMap<_, _> = snapshot.rows.into_iter().collect();
    let dumped = rows_in(&path).await?;
    ensure!(
        dumped == rows,
        "the dump has other row counts than the database: {dumped:?} instead of {rows:?}. The \
         backup was removed. Run this again"
    );
    let mut parts = vec![target.measure(DUMP)?];
    let secrets = SECRETS.iter().map(|file| file.name);
    for name in secrets.chain([CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID]) {
        parts.push(target.copy(&shared.file(name), &format!("{SHARED}/{name}"))?);
    }
    // A cluster of a release without this file has nothing that needs it.
    if shared.read_any(AT_REST_KEYS)?.is_some() {
        let name = format!("{SHARED}/{AT_REST_KEYS}");
        parts.push(target.copy(&shared.file(AT_REST_KEYS), &name)?);
    } else {
        ensure!(
            rows.get("recovery_bundle").is_none_or(|rows| *rows == 0),
            "{} is missing although there are recovery bundles, and a backup without it cannot be \
             used: no backup was created. Copy the file from another edge or an earlier backup first",
            shared.file(AT_REST_KEYS).display()
        );
    }
    Ok(Manifest {
        format: FORMAT,
        kind: StoreKind::Cluster,
        qpq_version: env!("CARGO_PKG_VERSION").into(),
        taken_at,
        store_id: snapshot.store_id,
        schema: snapshot.schema,
        rows,
        parts,
    })
}

fn database(settings: &ClusterSettings, shared: &ClusterDir) -> anyhow::Result<Config> {
    settings.database(OPAQUE_SETUP.fingerprint(&shared.secret(OPAQUE_SETUP)?))
}

/// Reads a complete dump, without a server. Returns the row counts by table.
pub(super) async fn rows_in(path: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut child =
        as_sql(path, true).spawn().map_err(|error| Program::Restore.not_started(error))?;
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).split(b'\n');
    let mut stderr = child.stderr.take().expect("it is piped");
    let reading = async {
        let mut rows = BTreeMap::new();
        let mut table: Option<(String, u64)> = None;
        while let Some(line) = lines.next_segment().await? {
            table = match table {
                Some((name, number)) if line == b"\\." => {
                    rows.insert(name, number);
                    None
                }
                Some((name, number)) => Some((name, number + 1)),
                None => {
                    std::str::from_utf8(&line).ok().and_then(copied_table).map(|name| (name, 0))
                }
            };
        }
        anyhow::Ok((rows, table.is_none()))
    };
    let mut errors = String::new();
    let (read, _) = tokio::join!(reading, stderr.read_to_string(&mut errors));
    let status = child.wait().await.context("pg_restore did not end")?;
    if !status.success() {
        return Err(damaged(path, &errors.lines().collect::<Vec<_>>().join("; ")));
    }
    let (mut rows, is_complete) = read?;
    ensure!(is_complete, "{}", damaged(path, "it ends within a table"));
    rows.remove("_sqlx_migrations");
    Ok(rows)
}

/// Restores the verified backup in `from` to the cluster's database, which must be empty.
pub(super) async fn restore(from: &Path, settings: &ClusterSettings) -> anyhow::Result<Restored> {
    let shared = ClusterDir::open(settings.secrets_dir()?).with_context(|| {
        format!(
            "copy {} to the directory that cluster.secrets_dir names first",
            from.join(SHARED).display()
        )
    })?;
    let backed_up = ClusterDir::open(from.join(SHARED))?;
    ensure!(
        shared.cluster_id()? == backed_up.cluster_id()?
            && shared.secret(OPAQUE_SETUP)? == backed_up.secret(OPAQUE_SETUP)?,
        "{} is the shared directory of another cluster. Copy {} there first",
        shared.path().display(),
        from.join(SHARED).display()
    );
    let config = database(settings, &shared)?;
    let connect = async || Operator::connect_to_any(&config).await;
    let mut operator = connect_with_retry(config.start_timeout, connect).await?;
    ensure!(
        operator.is_empty().await?,
        "the database that postgres.url names is not empty, and nothing is overwritten: create an \
         empty database, and name it in postgres.url"
    );
    let (removed_packages, ended_sessions) =
        load(&from.join(DUMP), &client_environment(&config)?).await?;
    drop(operator);
    // The backup may be of an earlier release, whose schema must be updated before edges start.
    qpq_store_cluster::migrate(&config).await?;
    let mut operator = Operator::connect(&config).await?;
    let store_id = operator.history().await?;
    Ok(Restored { store_id, removed_packages, ended_sessions, aside: None })
}

/// Begins another history in a database that another program has restored.
pub(super) async fn mark(
    settings: &ClusterSettings,
    sessions: OldSessions,
) -> anyhow::Result<Restored> {
    let shared = ClusterDir::open(settings.secrets_dir()?)?;
    let config = database(settings, &shared)?;
    let begin = async || qpq_store_cluster::begin_history(&config, sessions).await;
    Ok(connect_with_retry(config.start_timeout, begin).await?.into())
}

/// Runs the SQL of the dump and begins another history, in one transaction.
///
/// Returns the numbers of removed KeyPackages and of ended sessions.
async fn load(dump: &Path, environment: &[(&'static str, String)]) -> anyhow::Result<(u64, u64)> {
    let mut reader =
        as_sql(dump, false).spawn().map_err(|error| Program::Restore.not_started(error))?;
    let mut psql = Program::Psql.command(environment);
    psql.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--no-password"]);
    psql.args(["--set=ON_ERROR_STOP=1", "--output=/dev/null"]);
    let mut psql =
        psql.stdin(Stdio::piped()).spawn().map_err(|error| Program::Psql.not_started(error))?;
    let mut sql = reader.stdout.take().expect("it is piped");
    let mut stdin = psql.stdin.take().expect("it is piped");
    let feed = async move {
        stdin.write_all(b"BEGIN;\n").await?;
        tokio::io::copy(&mut sql, &mut stdin).await?;
        let read = reader.wait_with_output().await?;
        if read.status.success() {
            let [renew, remove, end_sessions] = BEGIN_HISTORY;
            let end = format!(
                "\nRESET search_path;\n{renew};\n\\o\n{remove};\n{end_sessions};\nCOMMIT;\n"
            );
            stdin.write_all(end.as_bytes()).await?;
        }
        // Without the COMMIT, Postgres rolls the transaction back.
        std::io::Result::Ok(read)
    };
    let (fed, loaded) = tokio::join!(feed, psql.wait_with_output());
    let loaded = Program::Psql.check(loaded.context("psql did not end")?)?;
    Program::Restore.check(fed.context("the dump cannot be passed to psql")?)?;
    let printed = String::from_utf8_lossy(&loaded.stdout);
    let mut numbers = printed.split_whitespace().rev().map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(ended_sessions), Some(removed_packages)) => Ok((removed_packages, ended_sessions)),
        _ => bail!("psql did not confirm that the restore was committed: {printed}"),
    }
}
