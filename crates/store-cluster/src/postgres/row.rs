//! Conversions between domain types and columns. A value that does not fit its type is an error
//! ([`NeverWritten`]).

use std::time::Duration;

use qpq_domain::{
    AccountId, ChannelId, DeviceId, GroupId, IdentityKey, Seq, StoreId, UnixMillis, Username,
};
use sqlx::{Row as _, postgres::PgRow};

use crate::error::NeverWritten;

/// Returns an instant as a column. An instant after the maximum of an `i64` becomes that maximum.
pub(crate) fn millis(at: UnixMillis) -> i64 {
    i64::try_from(at.0).unwrap_or(i64::MAX)
}

/// Returns a duration as a column.
pub(crate) fn millis_of(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Returns a seq, count or size as a column.
pub(crate) fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Returns Postgres' time, from the column `postgres` of a statement that selects `store_now()`.
/// NULL means that Postgres' clock is not used, as in tests that set the time.
pub(crate) fn now_of(row: &PgRow) -> sqlx::Result<Option<UnixMillis>> {
    let millis: Option<i64> = row.try_get("postgres")?;
    Ok(millis.map(|millis| UnixMillis(u64::try_from(millis).unwrap_or_default())))
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
    fn group(&self, column: &'static str) -> sqlx::Result<GroupId>;
    fn device(&self, column: &'static str) -> sqlx::Result<Option<DeviceId>>;
    fn signature(&self, column: &'static str) -> sqlx::Result<Option<[u8; 64]>>;
    fn username(&self, column: &'static str) -> sqlx::Result<Username>;
    fn store_id(&self, column: &'static str) -> sqlx::Result<StoreId>;
    fn bytes(&self, column: &'static str) -> sqlx::Result<Vec<u8>>;
}

impl Columns for PgRow {
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

    fn group(&self, column: &'static str) -> sqlx::Result<GroupId> {
        Ok(self.try_get::<&[u8], _>(column)?.try_into().map_err(|_| NeverWritten(column))?)
    }

    fn device(&self, column: &'static str) -> sqlx::Result<Option<DeviceId>> {
        let bytes = self.try_get::<Option<&[u8]>, _>(column)?;
        Ok(bytes.map(DeviceId::try_from).transpose().map_err(|_| NeverWritten(column))?)
    }

    fn signature(&self, column: &'static str) -> sqlx::Result<Option<[u8; 64]>> {
        let bytes = self.try_get::<Option<&[u8]>, _>(column)?;
        Ok(bytes.map(TryInto::try_into).transpose().map_err(|_| NeverWritten(column))?)
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
