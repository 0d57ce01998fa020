//! Conversions between domain types and columns.
//!
//! This program never writes a value that does not fit its type, so such a value is an error of the
//! row.

use std::time::Duration;

use qpq_domain::{AccountId, ChannelId, DeviceId, IdentityKey, Seq, StoreId, UnixMillis, Username};
use sqlx::{Row as _, sqlite::SqliteRow};

use crate::error::NeverWritten;

/// Converts an instant. An instant beyond the range of `i64` becomes `i64::MAX`.
pub(crate) fn millis(at: UnixMillis) -> i64 {
    i64::try_from(at.0).unwrap_or(i64::MAX)
}

/// Converts a duration to milliseconds.
pub(crate) fn millis_of(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Converts a seq, count or size.
pub(crate) fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Reads columns as domain types.
pub(crate) trait Columns {
    fn account(&self, column: &'static str) -> sqlx::Result<AccountId>;
    fn unsigned(&self, column: &'static str) -> sqlx::Result<u64>;
    fn at(&self, column: &'static str) -> sqlx::Result<UnixMillis>;
    fn seq(&self, column: &'static str) -> sqlx::Result<Seq>;
    fn hash(&self, column: &'static str) -> sqlx::Result<[u8; 32]>;
    fn identity(&self, column: &'static str) -> sqlx::Result<IdentityKey>;
    fn channel(&self, column: &'static str) -> sqlx::Result<ChannelId>;
    fn device(&self, column: &'static str) -> sqlx::Result<Option<DeviceId>>;
    fn username(&self, column: &'static str) -> sqlx::Result<Username>;
    fn store_id(&self, column: &'static str) -> sqlx::Result<StoreId>;
    fn bytes(&self, column: &'static str) -> sqlx::Result<Vec<u8>>;
}

impl Columns for SqliteRow {
    fn account(&self, column: &'static str) -> sqlx::Result<AccountId> {
        self.try_get(column).map(AccountId)
    }

    fn unsigned(&self, column: &'static str) -> sqlx::Result<u64> {
        Ok(u64::try_from(self.try_get::<i64, _>(column)?).map_err(|_| NeverWritten(column))?)
    }

    fn at(&self, column: &'static str) -> sqlx::Result<UnixMillis> {
        self.unsigned(column).map(UnixMillis)
    }

    fn seq(&self, column: &'static str) -> sqlx::Result<Seq> {
        self.unsigned(column).map(Seq)
    }

    fn hash(&self, column: &'static str) -> sqlx::Result<[u8; 32]> {
        Ok(self.try_get::<&[u8], _>(column)?.try_into().map_err(|_| NeverWritten(column))?)
    }

    fn identity(&self, column: &'static str) -> sqlx::Result<IdentityKey> {
        self.hash(column).map(IdentityKey::new)
    }

    fn channel(&self, column: &'static str) -> sqlx::Result<ChannelId> {
        Ok(self.try_get::<&[u8], _>(column)?.try_into().map_err(|_| NeverWritten(column))?)
    }

    fn device(&self, column: &'static str) -> sqlx::Result<Option<DeviceId>> {
        let bytes = self.try_get::<Option<&[u8]>, _>(column)?;
        Ok(bytes.map(DeviceId::try_from).transpose().map_err(|_| NeverWritten(column))?)
    }

    fn username(&self, column: &'static str) -> sqlx::Result<Username> {
        Ok(Username::parse(self.try_get(column)?).map_err(|_| NeverWritten(column))?)
    }

    fn store_id(&self, column: &'static str) -> sqlx::Result<StoreId> {
        Ok(self.try_get::<&[u8], _>(column)?.try_into().map_err(|_| NeverWritten(column))?)
    }

    fn bytes(&self, column: &'static str) -> sqlx::Result<Vec<u8>> {
        self.try_get(column)
    }
}
