//! Postgres: the one place where anything is durable.
//!
//! Every operation is a named transaction ([`Database::run`]) or a single statement
//! ([`Database::once`]), measured by its name, and done again where another transaction was in its
//! way. What was lost *before* its commit was sent changed nothing, so it is tried once more on
//! another connection; what was lost *while* it committed may have happened, so it is tried again
//! only where that does no harm ([`Repeat`]).

pub(crate) mod row;
mod schema;

use std::{io, time::Duration};

use futures_util::future::BoxFuture;
use qpq_domain::Backoff;
use qpq_ports::StoreResult;
use sqlx::{
    Connection as _, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode},
};
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, field::Empty};

use crate::{
    Config, ConnectError,
    error::{Kind, Server, Shared},
    metrics as names,
};

pub use schema::migrate;
pub(crate) use schema::{check_cluster, connect, connect_patiently, failed, prepare};

/// How often an operation is tried that others are in the way of.
const TRIES: u32 = 6;

/// The waits between attempts.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(320));

/// Whether an operation of unknown outcome may be done again by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// Twice is as good as once.
    Harmless,
    /// It gives something away, or tells apart first and second: the caller decides.
    Never,
}

/// A pool of connections and how work is done on them. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pool: PgPool,
    /// How long an attempt may take with a connection: a server that is there ends it sooner, by
    /// its own timeouts.
    patience: Duration,
}

/// Postgres is silent: it hangs, or the way to it is cut without anybody having been told.
#[derive(Debug, thiserror::Error)]
#[error("Postgres did not answer within {0:?}")]
struct Silent(Duration);

/// What an operation does with its connection. It may be done several times.
pub(crate) trait Work<T>:
    for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, sqlx::Result<T>>
{
}

impl<T, W: for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, sqlx::Result<T>>> Work<T> for W {}

impl Database {
    /// A pool that connects when it is needed.
    pub(crate) fn new(options: PgConnectOptions, connections: u32, timeout: Duration) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(timeout)
            // A ping before every use would be a round trip each; a dead connection is noticed by
            // its first statement.
            .test_before_acquire(false)
            .idle_timeout(Some(Duration::from_secs(600)))
            .max_lifetime(Some(Duration::from_secs(3_600)))
            .connect_lazy_with(options);
        Self { pool, patience: 2 * timeout }
    }

    /// Does `work` in a transaction.
    pub(crate) async fn run<T>(
        &self,
        name: &'static str,
        repeat: Repeat,
        work: impl Work<T> + Send + Sync,
    ) -> StoreResult<T> {
        self.measured(name, repeat, true, &work).await.map_err(Into::into)
    }

    /// As [`run`](Self::run), for who has to tell many callers of one failure.
    pub(crate) async fn run_shared<T>(
        &self,
        name: &'static str,
        repeat: Repeat,
        work: impl Work<T> + Send + Sync,
    ) -> Result<T, Shared> {
        self.measured(name, repeat, true, &work).await
    }

    /// Does `work`, which is a single statement, or reads alone.
    pub(crate) async fn once<T>(
        &self,
        name: &'static str,
        repeat: Repeat,
        work: impl Work<T> + Send + Sync,
    ) -> StoreResult<T> {
        self.measured(name, repeat, false, &work).await.map_err(Into::into)
    }

    /// As [`once`](Self::once), for who has to tell many callers of one failure.
    pub(crate) async fn once_shared<T>(
        &self,
        name: &'static str,
        repeat: Repeat,
        work: impl Work<T> + Send + Sync,
    ) -> Result<T, Shared> {
        self.measured(name, repeat, false, &work).await
    }

    /// Notes how many connections there are.
    pub(crate) fn observe(&self) {
        let (all, idle) = (self.pool.size() as usize, self.pool.num_idle());
        metrics::gauge!(names::PG_CONNECTIONS, "state" => "idle").set(idle as f64);
        metrics::gauge!(names::PG_CONNECTIONS, "state" => "busy")
            .set(all.saturating_sub(idle) as f64);
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }

    async fn measured<T>(
        &self,
        name: &'static str,
        repeat: Repeat,
        transaction: bool,
        work: &(impl Work<T> + Send + Sync),
    ) -> Result<T, Shared> {
        let begun = Instant::now();
        let span = tracing::debug_span!(
            target: "qpq::store",
            "postgres",
            otel.name = name,
            otel.kind = "client",
            otel.status_code = Empty,
            db.system.name = "postgresql",
            retries = Empty
        );
        let mut tries = 0;
        let outcome = loop {
            tries += 1;
            let sql =
                tracing::debug_span!(target: "qpq::store", parent: &span, "sql", attempt = tries);
            match self.attempt(transaction, work).instrument(sql).await {
                Ok(done) => break Ok(done),
                Err(Failed { error, happened }) => {
                    let again = match Kind::of(&error) {
                        Kind::Contention => tries < TRIES,
                        // Who has waited in vain has waited long enough.
                        Kind::Unreachable if is_timeout(&error) => false,
                        Kind::Unreachable => {
                            tries == 1 && (happened == Happened::No || repeat == Repeat::Harmless)
                        }
                        Kind::Refused | Kind::Corrupt => false,
                    };
                    if !again {
                        break Err(error);
                    }
                    metrics::counter!(names::PG_RETRIES, "op" => name).increment(1);
                    tokio::time::sleep(BACKOFF.delay(tries, rand::random())).await;
                }
            }
        };
        metrics::histogram!(names::PG_SECONDS, "op" => name).record(begun.elapsed());
        span.record("retries", tries - 1);
        outcome.map_err(|error| {
            let kind = Kind::of(&error);
            span.record("otel.status_code", "ERROR");
            metrics::counter!(names::PG_ERRORS, "op" => name, "kind" => kind.name()).increment(1);
            tracing::warn!(%error, kind = kind.name(), op = name, "Postgres did not do it");
            error.into()
        })
    }

    async fn attempt<T>(
        &self,
        transaction: bool,
        work: &(impl Work<T> + Send + Sync),
    ) -> Result<T, Failed> {
        let no = |error| Failed { error, happened: Happened::No };
        let perhaps = |error| Failed { error, happened: Happened::Perhaps };
        let mut connection = self.pool.acquire().await.map_err(no)?;
        let attempt = async {
            if !transaction {
                return work(&mut connection).await.map_err(perhaps);
            }
            let mut open = connection.begin().await.map_err(no)?;
            let done = work(&mut open).await.map_err(no)?;
            open.commit().await.map_err(perhaps)?;
            Ok(done)
        };
        match timeout(self.patience, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => {
                // In the pool it would keep its place until the kernel gives the connection up,
                // which takes minutes.
                drop(connection.detach());
                Err(perhaps(sqlx::Error::Io(io::Error::new(
                    io::ErrorKind::TimedOut,
                    Silent(self.patience),
                ))))
            }
        }
    }
}

fn is_timeout(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::PoolTimedOut => true,
        sqlx::Error::Io(error) => error.kind() == io::ErrorKind::TimedOut,
        _ => false,
    }
}

struct Failed {
    error: sqlx::Error,
    happened: Happened,
}

/// Whether what failed may have happened all the same.
#[derive(PartialEq, Eq)]
enum Happened {
    No,
    Perhaps,
}

/// How to connect, from the configuration, with what an edge needs besides.
pub(crate) fn options(config: &Config) -> Result<PgConnectOptions, ConnectError> {
    let options = as_given(config)?;
    let timeout = config.postgres_timeout.as_millis().to_string();
    Ok(options.application_name("qpq-server").options([
        // Acknowledged means durable, whatever the server's default is.
        ("synchronous_commit", "on"),
        ("statement_timeout", timeout.as_str()),
        ("lock_timeout", timeout.as_str()),
        ("idle_in_transaction_session_timeout", timeout.as_str()),
        ("timezone", "UTC"),
    ]))
}

/// How to connect, from the configuration alone.
pub(crate) fn as_given(config: &Config) -> Result<PgConnectOptions, ConnectError> {
    const SETTING: &str = "postgres.url";
    let endpoint = &config.postgres;
    let mut options: PgConnectOptions =
        endpoint.url.parse().map_err(|error: sqlx::Error| ConnectError::Url {
            setting: SETTING,
            cause: error.to_string(),
            expected: "it must be like postgres://user@host:5432/database",
        })?;
    if let Some(password) = &endpoint.password {
        options = options.password(password);
    }
    endpoint.authorities(Server::Postgres)?;
    if let Some(ca) = &endpoint.ca {
        options = options.ssl_root_cert(ca).ssl_mode(PgSslMode::VerifyFull);
    }
    Ok(options)
}
