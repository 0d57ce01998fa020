//! How a store fails.

/// What a port method answers.
pub type StoreResult<T> = Result<T, StoreError>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a store could not do what was asked. The source is for the log alone: it never goes to a
/// client.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another writer was first; nothing was changed, and the same call may be made again.
    #[error("another writer was first")]
    Conflict(#[source] Source),
    /// The store cannot be reached, is full, or did not answer in time. Nothing was acknowledged.
    #[error("the store is unavailable")]
    Unavailable(#[source] Source),
    /// What is stored makes no sense. Repeating will not help.
    #[error("the store is corrupt")]
    Corrupt(#[source] Source),
}

impl StoreError {
    pub fn conflict(source: impl Into<Source>) -> Self {
        Self::Conflict(source.into())
    }

    pub fn unavailable(source: impl Into<Source>) -> Self {
        Self::Unavailable(source.into())
    }

    pub fn corrupt(source: impl Into<Source>) -> Self {
        Self::Corrupt(source.into())
    }
}
