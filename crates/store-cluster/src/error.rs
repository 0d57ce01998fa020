//! Failures of Postgres, Redis and NATS, and whether the store retries them.
//!
//! At the start of an edge, an unreachable server is retried. Rejected credentials and an untrusted
//! certificate are mistakes in the configuration, which a retry does not correct. Each server
//! reports them in its own way. [`Server`] maps them to the same errors.

use std::{error::Error, io, sync::Arc, time::Duration};

use qpq_ports::StoreError;
use rustls::AlertDescription;
use tokio::time::timeout;

/// The kind of a failure of Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PostgresErrorKind {
    /// Another transaction interfered, and this one was rolled back. A retry may succeed.
    Contention,
    /// A constraint of the schema rejected a row.
    Rejected,
    /// A row has invalid values, or the data is damaged.
    Corrupt,
    /// The server is unreachable, shutting down or full, or did not answer in time.
    Unreachable,
}

impl PostgresErrorKind {
    /// Returns the kind by SQLSTATE (<https://www.postgresql.org/docs/15/errcodes-appendix.html>).
    pub(crate) fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(database) => match database.code().as_deref() {
                // Serialization failure, deadlock, lock timeout.
                Some("40001" | "40P01" | "55P03") => Self::Contention,
                Some("XX001" | "XX002") => Self::Corrupt,
                Some(code) if code.starts_with("23") => Self::Rejected,
                _ => Self::Unreachable,
            },
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::Decode(_)
            | sqlx::Error::RowNotFound => Self::Corrupt,
            _ => Self::Unreachable,
        }
    }

    /// Returns the label in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Contention => "contention",
            Self::Rejected => "refused",
            Self::Corrupt => "corrupt",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A failure of Postgres. Cheap to clone, since the calls of one transaction share it.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct PostgresError(Arc<sqlx::Error>);

impl PostgresError {
    pub(crate) fn kind(&self) -> PostgresErrorKind {
        PostgresErrorKind::of(&self.0)
    }

    /// Returns whether Postgres began the operation and did not end it in time.
    pub(crate) fn took_too_long(&self) -> bool {
        match &*self.0 {
            // A statement was cancelled by its timeout.
            sqlx::Error::Database(database) => database.code().as_deref() == Some("57014"),
            sqlx::Error::Io(error) => error.kind() == io::ErrorKind::TimedOut,
            _ => false,
        }
    }
}

impl From<sqlx::Error> for PostgresError {
    fn from(error: sqlx::Error) -> Self {
        Self(Arc::new(error))
    }
}

impl From<PostgresError> for StoreError {
    fn from(error: PostgresError) -> Self {
        match error.kind() {
            PostgresErrorKind::Contention | PostgresErrorKind::Rejected => Self::conflict(error),
            PostgresErrorKind::Corrupt => Self::corrupt(error),
            PostgresErrorKind::Unreachable => Self::unavailable(error),
        }
    }
}

/// The error of a stored value with a length or a range that this program never writes.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{0} has a value that this program never writes")]
pub(crate) struct NeverWritten(pub(crate) &'static str);

impl From<NeverWritten> for sqlx::Error {
    fn from(error: NeverWritten) -> Self {
        Self::Decode(Box::new(error))
    }
}

/// One of the three servers, with the names of its settings in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    Postgres,
    Redis,
    Nats,
}

impl Server {
    /// Creates the error of an unreachable server, which is retried.
    pub(crate) fn unreachable(self, cause: impl ToString) -> ConnectError {
        let (server, setting) = (self.name(), self.url());
        ConnectError::Unreachable { server, setting, cause: cause.to_string() }
    }

    /// Creates the error of a server that rejects the credentials.
    pub(crate) fn refuses(self, cause: impl ToString) -> ConnectError {
        let (url, password) = (self.url(), self.password());
        ConnectError::Refused { server: self.name(), url, password, cause: cause.to_string() }
    }

    /// Creates the error of a server without encryption or without a trusted certificate.
    pub(crate) fn untrusted(self, cause: impl ToString) -> ConnectError {
        let (url, ca) = (self.url(), self.ca());
        ConnectError::Untrusted { server: self.name(), url, ca, cause: cause.to_string() }
    }

    /// Returns the error [`untrusted`](Self::untrusted) if `error` is a permanent failure of TLS.
    pub(crate) fn tls_failure(self, error: &(dyn Error + 'static)) -> Option<ConnectError> {
        use AlertDescription::{CloseNotify, InternalError, UserCanceled};
        match tls_error(error)? {
            // A problem of the server, which may be temporary.
            rustls::Error::AlertReceived(CloseNotify | InternalError | UserCanceled) => None,
            error => Some(self.untrusted(error)),
        }
    }

    /// Returns the outcome of `work`, or an error if it takes longer than `within`.
    pub(crate) async fn answers<T>(
        self,
        within: Duration,
        work: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        timeout(within, work).await.unwrap_or_else(|_| {
            Err(self.unreachable(format_args!("no answer within {within:.1?}")))
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Postgres => "Postgres",
            Self::Redis => "Redis",
            Self::Nats => "NATS",
        }
    }

    const fn url(self) -> &'static str {
        match self {
            Self::Postgres => "postgres.url",
            Self::Redis => "redis.url",
            Self::Nats => "nats.url",
        }
    }

    const fn password(self) -> &'static str {
        match self {
            Self::Postgres => "postgres.password_file",
            Self::Redis => "redis.password_file",
            Self::Nats => "nats.password_file",
        }
    }

    pub(crate) const fn ca(self) -> &'static str {
        match self {
            Self::Postgres => "postgres.ca",
            Self::Redis => "redis.ca",
            Self::Nats => "nats.ca",
        }
    }
}

/// Returns the TLS error among the causes of a failure. Each client library wraps it in another
/// way.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = if let Some(io) = error.downcast_ref::<io::Error>() {
            // An `io::Error` skips the error that it wraps in `source`.
            io.get_ref().map(|inner| inner as &(dyn Error + 'static))
        } else if let Some(shared) = error.downcast_ref::<Arc<dyn Error + Send + Sync>>() {
            Some(&**shared as &(dyn Error + 'static))
        } else {
            error.source()
        };
    }
    None
}

/// The reason why the store cannot be used, and advice. Contains no URL, because a URL may contain
/// a password.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{setting} cannot be understood ({cause}): {expected}")]
    Url { setting: &'static str, cause: String, expected: &'static str },
    #[error("the file {} that {setting} names cannot be used: {cause}", path.display())]
    File { setting: &'static str, path: std::path::PathBuf, cause: String },
    #[error("{server} cannot be reached ({cause}): see that it runs and that {setting} is right")]
    Unreachable { server: &'static str, setting: &'static str, cause: String },
    #[error(
        "{server} does not let this program in ({cause}): correct the user and the password in {url} and {password}, or the rights of that user"
    )]
    Refused { server: &'static str, url: &'static str, password: &'static str, cause: String },
    #[error(
        "the connection to {server} cannot be encrypted and trusted ({cause}): see that {server} has TLS on, that its certificate is for the host name in {url}, and that {ca} contains the authority that issued the certificate"
    )]
    Untrusted { server: &'static str, url: &'static str, ca: &'static str, cause: String },
    #[error("{server} is version {found}, and at least {needed} is needed")]
    TooOld { server: &'static str, found: String, needed: &'static str },
    #[error(
        "the database's schema is older than this program (version {found}, needed {needed}): run `qpq-admin migrate`"
    )]
    Behind { found: i64, needed: i64 },
    #[error(
        "the database was created by an unreleased version whose schema {0} differs: start that version, or use a new database"
    )]
    OtherSchema(i64),
    #[error("the database cannot be migrated: {0}")]
    Migration(String),
    #[error(
        "this edge's OPAQUE setup is not the cluster's: accounts that registered with one cannot log in with the other. Use the directory that `qpq-admin init` created for this cluster"
    )]
    OtherCluster,
    #[error("the bucket of blobs cannot be used ({0}): correct the settings in the section blobs")]
    Bucket(String),
}
