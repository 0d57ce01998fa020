//! What SQLite's failures mean: for the one job that met them, for its batch, and for whoever
//! asked.

use std::sync::Arc;

use qpq_ports::StoreError;

use crate::damage;

/// SQLite's primary result codes that mean something here (<https://www.sqlite.org/rescode.html>).
mod code {
    pub(super) const PERM: i32 = 3;
    pub(super) const READONLY: i32 = 8;
    pub(super) const CORRUPT: i32 = 11;
    pub(super) const FULL: i32 = 13;
    pub(super) const CANTOPEN: i32 = 14;
    pub(super) const CONSTRAINT: i32 = 19;
    pub(super) const NOTADB: i32 = 26;
}

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A rule of the schema refused a row: nothing is wrong with the store.
    Refused,
    /// One row cannot be read as what it should be.
    BadRow,
    /// The file is damaged.
    Corrupt,
    /// No space left.
    Full,
    /// The file or its directory cannot be written or opened.
    NotWritable,
    /// Input or output failed, the connection is gone, or it took too long.
    Other,
}

impl Kind {
    pub(crate) fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(database) => {
                let extended = database.code().and_then(|code| code.parse::<i32>().ok());
                match extended.map(|code| code & 0xff) {
                    Some(code::CONSTRAINT) => Self::Refused,
                    Some(code::CORRUPT | code::NOTADB) => Self::Corrupt,
                    Some(code::FULL) => Self::Full,
                    Some(code::PERM | code::READONLY | code::CANTOPEN) => Self::NotWritable,
                    _ => Self::Other,
                }
            }
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::Decode(_)
            | sqlx::Error::RowNotFound => Self::BadRow,
            _ => Self::Other,
        }
    }

    /// Whether the job that met it is alone concerned: the others of its batch may still commit.
    pub(crate) fn is_the_jobs_own(self) -> bool {
        matches!(self, Self::Refused | Self::BadRow)
    }

    /// The label in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::BadRow => "bad_row",
            Self::Corrupt => "corrupt",
            Self::Full => "full",
            Self::NotWritable => "not_writable",
            Self::Other => "other",
        }
    }
}

/// One failure that many jobs share, because they were one transaction.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Shared(Arc<sqlx::Error>);

impl From<sqlx::Error> for Shared {
    fn from(error: sqlx::Error) -> Self {
        Self(Arc::new(error))
    }
}

impl From<Shared> for StoreError {
    fn from(error: Shared) -> Self {
        match Kind::of(&error.0) {
            Kind::Refused => Self::conflict(error),
            Kind::Corrupt => {
                damage::met();
                Self::corrupt(error)
            }
            Kind::BadRow => Self::corrupt(error),
            Kind::Full | Kind::NotWritable | Kind::Other => Self::unavailable(error),
        }
    }
}

/// For reads: what the port answers.
pub(crate) fn read_failed(error: sqlx::Error) -> StoreError {
    metrics::counter!(crate::metrics::ERRORS, "kind" => Kind::of(&error).name()).increment(1);
    Shared::from(error).into()
}

/// A stored value has a length or range that no code here ever writes.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("column {0} holds a value that was never written by this program")]
pub(crate) struct NeverWritten(pub(crate) &'static str);

impl From<NeverWritten> for sqlx::Error {
    fn from(error: NeverWritten) -> Self {
        Self::Decode(Box::new(error))
    }
}
