//! Failures of stores.

/// The result of a port method.
pub type StoreResult<T> = Result<T, StoreError>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// The failure of a store. The source is for the log only and is never sent to a client.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another writer was first. Nothing was changed, and the call may be repeated.
    #[error("another writer was first")]
    Conflict(#[source] Source),
    /// The store is unreachable, full, or did not answer in time. Nothing was acknowledged.
    #[error("the store is unavailable")]
    Unavailable(#[source] Source),
    /// The stored data is invalid. Repeating the call does not help.
    #[error("the store is corrupt")]
    Corrupt(#[source] Source),
}

impl StoreError {
    /// Creates a [`StoreError::Conflict`].
    pub fn conflict(source: impl Into<Source>) -> Self {
        Self::Conflict(source.into())
    }

    /// Creates a [`StoreError::Unavailable`].
    pub fn unavailable(source: impl Into<Source>) -> Self {
        Self::Unavailable(source.into())
    }

    /// Creates a [`StoreError::Corrupt`].
    pub fn corrupt(source: impl Into<Source>) -> Self {
        Self::Corrupt(source.into())
    }
}
