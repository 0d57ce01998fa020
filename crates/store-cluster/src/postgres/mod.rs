//! Postgres, where everything durable is committed.
//!
//! An operation is a value ([`Statement`]): its parameters, its name in metrics and logs, whether
//! it needs a transaction, and whether it may be repeated. [`Database::run`] measures it and
//! retries it. An operation that another transaction interfered with is rolled back and repeated. A
//! connection that is lost *before* the commit was sent has changed nothing, so the operation is
//! repeated once on another connection. A connection that is lost *during* the commit leaves the
//! outcome unknown, so the operation is repeated only where that is harmless ([`Repeat`]).

mod release;
pub(crate) mod row;
mod schema;

use std::{io, time::Duration};

use qpq_domain::Backoff;
use secrecy::ExposeSecret as _;
use sqlx::{
    Connection as _, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode},
};
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, field::Empty};

use crate::{
    Config, ConnectError,
    error::{PostgresError, PostgresErrorKind, Server},
    metrics as names,
};

pub(crate) use release::{ClusterMark, OlderEdges, is_cluster_of, mark_cluster};
pub use schema::migrate;
pub(crate) use schema::{check_cluster, connect, connect_patiently, failed, prepare};

/// Maximum attempts at an operation under lock contention.
const MAX_ATTEMPTS: u32 = 6;

/// The waits between attempts.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(320));

/// The treatment of an operation whose outcome is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// The operation is repeated: twice has the same result as once.
    Harmless,
    /// The operation is not repeated, because a repeat would have another result. The caller
    /// receives the error.
    Never,
}

/// The part of an operation that is rolled back when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All statements of the operation, which are one transaction.
    Transaction,
    /// Nothing: the operation is a single statement, or only reads.
    Statement,
}

/// An operation on the database, with its parameters.
pub(crate) trait Statement: Sync {
    /// The result of the operation.
    type Output: Send;

    /// The treatment of the operation when its outcome is unknown.
    const REPEAT: Repeat;

    /// The part that is rolled back when the operation fails.
    const SCOPE: Scope;

    /// Returns the name of the operation in metrics, traces and logs.
    fn name(&self) -> &'static str;

    /// Executes the operation on a connection. Called once for each attempt.
    fn run(
        &self,
        connection: &mut PgConnection,
    ) -> impl Future<Output = sqlx::Result<Self::Output>> + Send;
}

/// A pool of connections. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pool: PgPool,
    /// Maximum duration of one attempt with a connection. A reachable server ends the attempt
    /// earlier by its own timeouts.
    attempt_timeout: Duration,
}

/// The error if Postgres hangs, or the network drops its packets.
#[derive(Debug, thiserror::Error)]
#[error("Postgres did not answer within {0:?}")]
struct NoAnswer(Duration);

impl Database {
    /// Creates a pool that connects on first use.
    pub(crate) fn new(options: PgConnectOptions, connections: u32, timeout: Duration) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(timeout)
            // A ping before every use would cost a round trip. Without it, the first statement on a
            // dead connection fails.
            .test_before_acquire(false)
            .idle_timeout(Some(Duration::from_secs(600)))
            .max_lifetime(Some(Duration::from_secs(3_600)))
            .connect_lazy_with(options);
        Self { pool, attempt_timeout: 2 * timeout }
    }

    /// Executes an operation, retrying it where that is safe.
    pub(crate) async fn run<S: Statement>(
        &self,
        statement: &S,
    ) -> Result<S::Output, PostgresError> {
        let (name, begun) = (statement.name(), Instant::now());
        let span = tracing::debug_span!(
            target: "qpq::store",
            "postgres",
            otel.name = name,
            otel.kind = "client",
            otel.status_code = Empty,
            db.system.name = "postgresql",
            retries = Empty
        );
        let mut attempts = 0;
        let outcome = loop {
            attempts += 1;
            let n = attempts;
            let sql = tracing::debug_span!(target: "qpq::store", parent: &span, "sql", attempt = n);
            match self.attempt(statement).instrument(sql).await {
                Ok(done) => break Ok(done),
                Err(failure) if failure.is_retried::<S>(attempts) => {
                    metrics::counter!(names::PG_RETRIES, "op" => name).increment(1);
                    tokio::time::sleep(BACKOFF.delay(attempts, rand::random())).await;
                }
                Err(Failure { error, .. }) => break Err(error),
            }
        };
        metrics::histogram!(names::PG_SECONDS, "op" => name).record(begun.elapsed());
        span.record("retries", attempts - 1);
        outcome.map_err(|error| {
            let kind = PostgresErrorKind::of(&error);
            span.record("otel.status_code", "ERROR");
            metrics::counter!(names::PG_ERRORS, "op" => name, "kind" => kind.name()).increment(1);
            tracing::warn!(%error, kind = kind.name(), op = name, "postgres operation failed");
            error.into()
        })
    }

    /// Records the number of connections.
    pub(crate) fn observe(&self) {
        let (all, idle) = (self.pool.size() as usize, self.pool.num_idle());
        metrics::gauge!(names::PG_CONNECTIONS, "state" => "idle").set(idle as f64);
        metrics::gauge!(names::PG_CONNECTIONS, "state" => "busy")
            .set(all.saturating_sub(idle) as f64);
    }

    /// Closes all connections.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }

    async fn attempt<S: Statement>(&self, statement: &S) -> Result<S::Output, Failure> {
        let no = |error| Failure { error, committed: Committed::No };
        let unknown = |error| Failure { error, committed: Committed::Unknown };
        let mut connection = self.pool.acquire().await.map_err(no)?;
        let attempt = async {
            match S::SCOPE {
                Scope::Statement => statement.run(&mut connection).await.map_err(unknown),
                Scope::Transaction => {
                    let mut open = connection.begin().await.map_err(no)?;
                    match statement.run(&mut open).await {
                        Ok(done) => open.commit().await.map(|()| done).map_err(unknown),
                        Err(error) => {
                            // A dropped transaction would be rolled back later, and a retry on
                            // another connection would wait for its locks. A failed rollback is
                            // ignored: the connection is lost, and its transaction with it.
                            let _ = open.rollback().await;
                            Err(no(error))
                        }
                    }
                }
            }
        };
        match timeout(self.attempt_timeout, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => {
                // In the pool, the connection would occupy a place until the kernel closes it,
                // which takes minutes.
                drop(connection.detach());
                Err(unknown(sqlx::Error::Io(io::Error::new(
                    io::ErrorKind::TimedOut,
                    NoAnswer(self.attempt_timeout),
                ))))
            }
        }
    }
}

/// A failed attempt.
struct Failure {
    error: sqlx::Error,
    committed: Committed,
}

/// The effect of a failed attempt on the database.
#[derive(PartialEq, Eq)]
enum Committed {
    No,
    Unknown,
}

impl Failure {
    /// Returns whether the operation is repeated after this number of attempts.
    fn is_retried<S: Statement>(&self, attempts: u32) -> bool {
        match PostgresErrorKind::of(&self.error) {
            PostgresErrorKind::Contention => attempts < MAX_ATTEMPTS,
            // The caller has already waited for the timeout.
            PostgresErrorKind::Unreachable if is_timeout(&self.error) => false,
            PostgresErrorKind::Unreachable => {
                attempts == 1 && (self.committed == Committed::No || S::REPEAT == Repeat::Harmless)
            }
            PostgresErrorKind::Rejected | PostgresErrorKind::Corrupt => false,
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

/// Returns the connection options of an edge: the configured ones, durable commits and timeouts.
pub(crate) fn options(config: &Config) -> Result<PgConnectOptions, ConnectError> {
    let options = as_given(config)?;
    let timeout = config.postgres_timeout.as_millis().to_string();
    Ok(options.application_name(release::APPLICATION_NAME).options([
        // An acknowledged commit is durable, also if the server's default differs.
        ("synchronous_commit", "on"),
        ("statement_timeout", timeout.as_str()),
        ("lock_timeout", timeout.as_str()),
        ("idle_in_transaction_session_timeout", timeout.as_str()),
        ("timezone", "UTC"),
        // Each statement is planned once on a connection, without its parameters. Planning takes
        // several times as long as execution (docs/decisions/0019).
        ("plan_cache_mode", "force_generic_plan"),
        // Such a plan may be from a time when the tables were empty, so it must use indexes. A scan
        // of a table without a usable index is still possible; its cost is then so high that the
        // plan would be compiled.
        ("enable_seqscan", "off"),
        ("jit", "off"),
    ]))
}

/// Returns the connection options, from the configuration alone.
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
        options = options.password(password.expose_secret());
    }
    endpoint.authorities(Server::Postgres)?;
    if let Some(ca) = &endpoint.ca {
        options = options.ssl_root_cert(ca).ssl_mode(PgSslMode::VerifyFull);
    }
    Ok(options)
}
