//! What the failures of Postgres, Redis and NATS mean, for whoever asked and for whoever would try again.

use std::sync::Arc;

use qpq_ports::StoreError;

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Another transaction was in the way and this one was rolled back: the same again may well succeed.
    Contention,
    /// A rule of the schema refused a row.
    Refused,
    /// One row cannot be read as what it should be, or the data are damaged.
    Corrupt,
    /// The server cannot be reached, is going away, has no room, or did not answer in time.
    Unreachable,
}

impl Kind {
    /// By SQLSTATE (<https://www.postgresql.org/docs/15/errcodes-appendix.html>).
    pub(crate) fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(database) => match database.code().as_deref() {
                // Serialization failure, deadlock, a lock that was not to be had in time.
                Some("40001" | "40P01" | "55P03") => Self::Contention,
                Some("XX001" | "XX002") => Self::Corrupt,
                Some(code) if code.starts_with("23") => Self::Refused,
                _ => Self::Unreachable,
            },
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::Decode(_)
            | sqlx::Error::RowNotFound => Self::Corrupt,
            _ => Self::Unreachable,
        }
    }

    /// The label in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Contention => "contention",
            Self::Refused => "refused",
            Self::Corrupt => "corrupt",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One failure that many callers share, because they were one transaction.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Shared(Arc<sqlx::Error>);

impl Shared {
    pub(crate) fn kind(&self) -> Kind {
        Kind::of(&self.0)
    }
}

impl From<sqlx::Error> for Shared {
    fn from(error: sqlx::Error) -> Self {
        Self(Arc::new(error))
    }
}

impl From<Shared> for StoreError {
    fn from(error: Shared) -> Self {
        match error.kind() {
            Kind::Contention | Kind::Refused => Self::conflict(error),
            Kind::Corrupt => Self::corrupt(error),
            Kind::Unreachable => Self::unavailable(error),
        }
    }
}

/// A stored value has a length or range that no code here ever writes.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{0} holds a value that was never written by this program")]
pub(crate) struct NeverWritten(pub(crate) &'static str);

impl From<NeverWritten> for sqlx::Error {
    fn from(error: NeverWritten) -> Self {
        Self::Decode(Box::new(error))
    }
}

/// Why the store cannot be used, and what to do about it. No URL is in it: it may hold a password.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{setting} cannot be understood ({cause}): {expected}")]
    Url { setting: &'static str, cause: String, expected: &'static str },
    #[error("the file {} that {setting} names cannot be used: {cause}", path.display())]
    File { setting: &'static str, path: std::path::PathBuf, cause: String },
    #[error("{server} cannot be reached ({cause}): see that it runs and that {setting} is right")]
    Unreachable { server: &'static str, setting: &'static str, cause: String },
    #[error("{server} is version {found}, and at least {needed} is needed")]
    TooOld { server: &'static str, found: String, needed: &'static str },
    #[error(
        "the database's schema is older than this program (version {found}, needed {needed}): run `qpq-admin migrate`"
    )]
    Behind { found: i64, needed: i64 },
    #[error(
        "the database was set up by an unreleased version whose schema {0} was another: start that version, or use a new database"
    )]
    OtherSchema(i64),
    #[error("the database cannot be migrated: {0}")]
    Migration(String),
    #[error(
        "this edge's OPAQUE setup is not the cluster's: nobody who registered with one can log in with the other. Give it the directory that `qpq-admin init` made for this cluster"
    )]
    OtherCluster,
}
