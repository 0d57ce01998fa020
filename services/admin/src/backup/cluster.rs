//! Backing up a cluster: its database through Postgres' own programs, and the directory that all
//! edges share. Redis and NATS have nothing that must be kept.
//!
//! A restore is one transaction: the tables, and the beginning of another history. So a restore that
//! is killed leaves an empty database.

use std::{collections::BTreeMap, path::Path, process::Stdio};

use anyhow::{Context as _, bail, ensure};
use qpq_ports::{Clock as _, SystemClock};
use qpq_runtime::data_dir::cluster::{
    CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID, ClusterDir, OPAQUE_SETUP, SECRETS,
};
use qpq_store_cluster::{BEGIN_HISTORY, Config, Operator, client_environment};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use super::{
    manifest::{FORMAT, Kind, Manifest, utc},
    postgres::{Program, as_sql, copied_table, damaged, dump},
    restore::Done,
    unfinished::Unfinished,
};
use crate::settings::{Given, patiently};

pub(super) const DUMP: &str = "postgres.dump";
pub(super) const SHARED: &str = "shared";

/// Copies the shared directory and dumps the database.
pub(super) async fn back_up(given: &Given, target: &Unfinished) -> anyhow::Result<Manifest> {
    let fleet = ClusterDir::open(given.secrets_dir()?)?;
    fleet.cluster_id()?;
    let config = database(given, &fleet)?;
    let taken_at = utc(SystemClock.now().0 / 1_000);
    let mut operator =
        patiently(config.start_timeout, async || Operator::connect(&config).await).await?;
    let snapshot = operator.snapshot().await?;
    let path = target.path().join(DUMP);
    dump(&client_environment(&config)?, &snapshot.name, &path).await?;
    drop(operator);
    let rows: BTreeMap<_, _> = snapshot.rows.into_iter().collect();
    let dumped = rows_in(&path).await?;
    ensure!(
        dumped == rows,
        "the dump has other numbers of rows than the database: {dumped:?} instead of {rows:?}. Nothing of it was kept"
    );
    let mut parts = vec![target.measure(DUMP)?];
    let secrets = SECRETS.iter().map(|file| file.name);
    for name in secrets.chain([CERTIFICATE, CERTIFICATE_KEY, CLUSTER_ID]) {
        parts.push(target.copy(&fleet.file(name), &format!("{SHARED}/{name}"))?);
    }
    Ok(Manifest {
        format: FORMAT,
        kind: Kind::Cluster,
        qpq_version: env!("CARGO_PKG_VERSION").into(),
        taken_at,
        store_id: snapshot.store_id,
        schema: snapshot.schema,
        rows,
        parts,
    })
}

fn database(given: &Given, fleet: &ClusterDir) -> anyhow::Result<Config> {
    given.database(OPAQUE_SETUP.fingerprint(&fleet.secret(OPAQUE_SETUP)?))
}

/// Reads a whole dump, without a server; its rows by table.
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
    let mut said = String::new();
    let (read, _) = tokio::join!(reading, stderr.read_to_string(&mut said));
    let status = child.wait().await.context("pg_restore was lost")?;
    if !status.success() {
        return Err(damaged(path, &said.lines().collect::<Vec<_>>().join("; ")));
    }
    let (mut rows, is_complete) = read?;
    ensure!(is_complete, "{}", damaged(path, "it ends within a table"));
    rows.remove("_sqlx_migrations");
    Ok(rows)
}

/// Brings the checked backup in `from` into the cluster's database, which must be empty.
pub(super) async fn restore(from: &Path, given: &Given) -> anyhow::Result<Done> {
    let fleet = ClusterDir::open(given.secrets_dir()?).with_context(|| {
        format!("copy {} to where cluster.secrets_dir says first", from.join(SHARED).display())
    })?;
    let backed_up = ClusterDir::open(from.join(SHARED))?;
    ensure!(
        fleet.cluster_id()? == backed_up.cluster_id()?
            && fleet.secret(OPAQUE_SETUP)? == backed_up.secret(OPAQUE_SETUP)?,
        "{} is the shared directory of another cluster. Copy {} there first",
        fleet.path().display(),
        from.join(SHARED).display()
    );
    let config = database(given, &fleet)?;
    let mut operator =
        patiently(config.start_timeout, async || Operator::connect_to_any(&config).await).await?;
    ensure!(
        operator.is_empty().await?,
        "the database that postgres.url names is not empty, and nothing is overwritten: create an empty one, and name \
         it in postgres.url"
    );
    let removed = load(&from.join(DUMP), &client_environment(&config)?).await?;
    drop(operator);
    // A schema of an earlier release is brought up to date, as before any start of edges.
    qpq_store_cluster::migrate(&config).await?;
    let mut operator = Operator::connect(&config).await?;
    let store_id = operator.history().await?;
    Ok(Done { store_id, removed_packages: removed, aside: None })
}

/// Begins another history in a database that was restored by other means.
pub(super) async fn mark(given: &Given) -> anyhow::Result<Done> {
    let fleet = ClusterDir::open(given.secrets_dir()?)?;
    let config = database(given, &fleet)?;
    let begin = async || qpq_store_cluster::begin_history(&config).await;
    Ok(patiently(config.start_timeout, begin).await?.into())
}

/// Runs the dump's SQL and the beginning of another history as one transaction. Returns how many
/// KeyPackages that removed.
async fn load(dump: &Path, environment: &[(&'static str, String)]) -> anyhow::Result<u64> {
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
            let [renew, remove] = BEGIN_HISTORY;
            let end = format!("\nRESET search_path;\n{renew};\n\\o\n{remove};\nCOMMIT;\n");
            stdin.write_all(end.as_bytes()).await?;
        }
        // Without its COMMIT the transaction is rolled back.
        std::io::Result::Ok(read)
    };
    let (fed, loaded) = tokio::join!(feed, psql.wait_with_output());
    let loaded = Program::Psql.check(loaded.context("psql was lost")?)?;
    Program::Restore.check(fed.context("the dump cannot be passed to psql")?)?;
    let printed = String::from_utf8_lossy(&loaded.stdout);
    match printed.split_whitespace().last().and_then(|number| number.parse().ok()) {
        Some(removed) => Ok(removed),
        None => bail!("psql did not say that the restore was committed: {printed}"),
    }
}
