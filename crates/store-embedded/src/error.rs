//! The meaning of SQLite's failures: for a statement, for its batch, and for the caller of a port.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use qpq_ports::StoreError;

use crate::metrics as names;

/// The primary result codes of SQLite that the store distinguishes
/// (<https://www.sqlite.org/rescode.html>).
mod code {
    pub(super) const PERM: i32 = 3;
    pub(super) const READONLY: i32 = 8;
    pub(super) const CORRUPT: i32 = 11;
    pub(super) const FULL: i32 = 13;
    pub(super) const CANTOPEN: i32 = 14;
    pub(super) const CONSTRAINT: i32 = 19;
    pub(super) const NOTADB: i32 = 26;
}

/// The cause of a failure, as far as the store distinguishes causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    /// A rule of the schema refused a row. The store works.
    Constraint,
    /// One row does not have the types that this program writes.
    BadRow,
    /// The file is damaged.
    Corrupt,
    /// No space is left.
    Full,
    /// The file or its directory cannot be written or opened.
    NotWritable,
    /// Input or output failed, the connection is closed, or a limit of time was reached.
    Other,
}

impl ErrorKind {
    pub(crate) fn of(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(database) => {
                let extended = database.code().and_then(|code| code.parse::<i32>().ok());
                match extended.map(|code| code & 0xff) {
                    Some(code::CONSTRAINT) => Self::Constraint,
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

    /// Returns whether the failure concerns one statement alone, so that the rest of its batch may
    /// commit.
    pub(crate) fn concerns_one_statement(self) -> bool {
        matches!(self, Self::Constraint | Self::BadRow)
    }

    /// Counts a failure of this kind.
    pub(crate) fn count(self) {
        metrics::counter!(names::ERRORS, "kind" => self.label()).increment(1);
    }

    /// Returns the label in metrics and logs.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Constraint => "refused",
            Self::BadRow => "bad_row",
            Self::Corrupt => "corrupt",
            Self::Full => "full",
            Self::NotWritable => "not_writable",
            Self::Other => "other",
        }
    }
}

/// The number of statements that failed on a damaged page, in all stores of this process.
static CORRUPT_PAGES_MET: AtomicU64 = AtomicU64::new(0);

/// Returns the number of statements that failed on a damaged page, in all stores of this process.
pub(crate) fn corrupt_pages_met() -> u64 {
    CORRUPT_PAGES_MET.load(Ordering::Relaxed)
}

/// One failure, returned to all callers whose statements were in one transaction.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct SharedError(Arc<sqlx::Error>);

impl From<sqlx::Error> for SharedError {
    fn from(error: sqlx::Error) -> Self {
        Self(Arc::new(error))
    }
}

impl From<SharedError> for StoreError {
    fn from(error: SharedError) -> Self {
        match ErrorKind::of(&error.0) {
            ErrorKind::Constraint => Self::conflict(error),
            ErrorKind::Corrupt => {
                CORRUPT_PAGES_MET.fetch_add(1, Ordering::Relaxed);
                Self::corrupt(error)
            }
            ErrorKind::BadRow => Self::corrupt(error),
            ErrorKind::Full | ErrorKind::NotWritable | ErrorKind::Other => Self::unavailable(error),
        }
    }
}

/// Counts a failed read and converts its error for the port.
pub(crate) fn read_failed(error: sqlx::Error) -> StoreError {
    ErrorKind::of(&error).count();
    SharedError::from(error).into()
}

/// The error of a column with a value that this program never writes.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("column {0} has a value that this program never writes")]
pub(crate) struct NeverWritten(pub(crate) &'static str);

impl From<NeverWritten> for sqlx::Error {
    fn from(error: NeverWritten) -> Self {
        Self::Decode(Box::new(error))
    }
}
