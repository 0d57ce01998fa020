//! `qpq-admin jobs`: the queue of durable work of a single node or a cluster. The servers may be
//! running or stopped.

use std::{fmt::Write as _, path::Path, sync::Arc};

use anyhow::bail;
use clap::Subcommand;
use qpq_ports::{Clock as _, DeadChange, DeadJob, JobId, JobStats, Jobs, SystemClock};
use qpq_store_embedded::JobsOperator;

use crate::{
    backup::{Store, StoreArgs},
    block_on, print, roughly,
    settings::connect_with_retry,
};

/// The arguments of `jobs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Count the jobs of each kind, and list the dead jobs, which failed and are not retried.
    List(ListArgs),
    /// Run a dead job again.
    Retry(ChangeArgs),
    /// Remove a dead job. Its work is never done.
    Remove(ChangeArgs),
}

/// The arguments of `jobs list`.
#[derive(Debug, clap::Args)]
struct ListArgs {
    /// List at most this many dead jobs, the newest ones.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: u32,
    #[command(flatten)]
    store: StoreArgs,
}

/// The arguments of `jobs retry` and `jobs remove`.
#[derive(Debug, clap::Args)]
struct ChangeArgs {
    /// The number of a dead job, as `qpq-admin jobs list` shows it.
    #[arg(value_name = "ID")]
    id: i64,
    #[command(flatten)]
    store: StoreArgs,
}

/// The queue of a single node or of a cluster.
enum Queue {
    Node(JobsOperator),
    Cluster(Arc<dyn Jobs>),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.command {
        Command::List(args) => list(args),
        Command::Retry(args) => change(args, "is due now", async |queue, id| queue.retry(id).await),
        Command::Remove(args) => {
            change(args, "is removed", async |queue, id| queue.remove(id).await)
        }
    }
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let store = args.store.store()?;
    let (stats, dead) = block_on(async {
        let mut queue = Queue::open(&store).await?;
        Ok((queue.stats().await?, queue.dead(args.limit).await?))
    })?;
    print(tables(&stats, &dead))
}

fn change(
    args: &ChangeArgs,
    done: &str,
    change: impl AsyncFn(&mut Queue, JobId) -> anyhow::Result<DeadChange>,
) -> anyhow::Result<()> {
    let (store, id) = (args.store.store()?, args.id);
    let changed = block_on(async {
        let mut queue = Queue::open(&store).await?;
        change(&mut queue, JobId(id)).await
    })?;
    match changed {
        DeadChange::Changed => print(format_args!("Job {id} {done}.\n")),
        DeadChange::NotFound => {
            bail!("no dead job has the number {id}. See `qpq-admin jobs list`")
        }
        DeadChange::Superseded => bail!(
            "job {id} was not changed: a newer job does the same work. Remove job {id} with \
             `qpq-admin jobs remove {id}`"
        ),
    }
}

impl Queue {
    async fn open(store: &Store) -> anyhow::Result<Self> {
        match store {
            Store::Node(dir, _) => Self::open_node(dir).await,
            Store::Cluster(settings) => {
                // The commands for jobs do not check the OPAQUE setup, which identifies a cluster.
                let database = settings.database([0; 32])?;
                let connect = async || qpq_store_cluster::operator_jobs(&database).await;
                Ok(Self::Cluster(connect_with_retry(database.start_timeout, connect).await?))
            }
        }
    }

    async fn open_node(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self::Node(JobsOperator::open(dir).await?))
    }

    async fn stats(&mut self) -> anyhow::Result<Vec<JobStats>> {
        let now = SystemClock.now();
        Ok(match self {
            Self::Node(jobs) => jobs.stats(now).await?,
            Self::Cluster(jobs) => jobs.stats(now).await?,
        })
    }

    async fn dead(&mut self, limit: u32) -> anyhow::Result<Vec<DeadJob>> {
        Ok(match self {
            Self::Node(jobs) => jobs.dead(limit).await?,
            Self::Cluster(jobs) => jobs.dead(limit).await?,
        })
    }

    async fn retry(&mut self, job: JobId) -> anyhow::Result<DeadChange> {
        let now = SystemClock.now();
        Ok(match self {
            Self::Node(jobs) => jobs.retry_dead(job, now).await?,
            Self::Cluster(jobs) => jobs.retry_dead(job, now).await?,
        })
    }

    async fn remove(&mut self, job: JobId) -> anyhow::Result<DeadChange> {
        Ok(match self {
            Self::Node(jobs) => jobs.remove_dead(job).await?,
            Self::Cluster(jobs) => jobs.remove_dead(job).await?,
        })
    }
}

fn tables(stats: &[JobStats], dead: &[DeadJob]) -> String {
    let mut text =
        format!("{:<24} {:>8} {:>8} {:>8}  {}\n", "KIND", "WAITING", "CLAIMED", "DEAD", "OVERDUE");
    for JobStats { kind, waiting, claimed, dead, overdue } in stats {
        let overdue = roughly(*overdue);
        let _ = writeln!(text, "{kind:<24} {waiting:>8} {claimed:>8} {dead:>8}  {overdue}");
    }
    if dead.is_empty() {
        text.push_str("\nNo job is dead.\n");
        return text;
    }
    let _ = writeln!(
        text,
        "\n{:>8}  {:<24} {:>8}  {:<8}  ERROR",
        "ID", "DEAD JOB", "ATTEMPTS", "SINCE"
    );
    let now = SystemClock.now();
    for DeadJob { id, kind, attempts, died_at, error } in dead {
        let (id, since) = (id.0, roughly(now.since(*died_at)));
        let _ = writeln!(text, "{id:>8}  {kind:<24} {attempts:>8}  {since:<8}  {error}");
    }
    text
}
