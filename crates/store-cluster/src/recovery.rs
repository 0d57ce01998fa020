//! Recovery bundles in Postgres.

use async_trait::async_trait;
use qpq_domain::{AccountId, UnixMillis};
use qpq_ports::{
    AtRestKeyId, BundleFetch, BundlePut, BundleState, FETCH_DAY, NewBundle, RecoveryBundles,
    StoreResult, StoredBundle,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    error::NeverWritten,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, number},
    },
};

const FIND: &str = "SELECT version, bundle, stored_at FROM recovery_bundle WHERE account = $1";

const INSERT: &str = "
    INSERT INTO recovery_bundle (account, version, bundle, key_id, stored_at)
    VALUES ($1, $2 + 1, $3, $4, $5) ON CONFLICT DO NOTHING";
const REPLACE: &str = "
    UPDATE recovery_bundle SET version = $2 + 1, bundle = $3, key_id = $4, stored_at = $5
     WHERE account = $1 AND version = $2";
/// A separate statement, because it sees the row that the insert or the update waited for.
const IS_REPEAT: &str = "
    SELECT EXISTS (SELECT 1 FROM recovery_bundle
                    WHERE account = $1 AND version = $2 + 1 AND bundle = $3)";

const LOCK: &str = "
    SELECT version, bundle, stored_at, counted_from, fetches FROM recovery_bundle
     WHERE account = $1 FOR NO KEY UPDATE";
const COUNT: &str = "
    UPDATE recovery_bundle SET counted_from = $2, fetches = $3 WHERE account = $1";

const REMOVE: &str = "
    UPDATE recovery_bundle SET version = version + 1, bundle = NULL, key_id = NULL
     WHERE account = $1 AND bundle IS NOT NULL";

const NEXT_KEY: &str = "
    SELECT key_id FROM recovery_bundle WHERE key_id IS NOT NULL AND key_id > $1
     ORDER BY key_id LIMIT 1";

#[async_trait]
impl RecoveryBundles for ClusterStore {
    async fn find(&self, account: AccountId) -> StoreResult<BundleState> {
        Ok(self.inner.database.run(&FindBundle(account)).await?)
    }

    async fn put(&self, bundle: NewBundle) -> StoreResult<BundlePut> {
        Ok(self.inner.database.run(&PutBundle(bundle)).await?)
    }

    async fn fetch(
        &self,
        account: AccountId,
        now: UnixMillis,
        per_day: u32,
    ) -> StoreResult<BundleFetch> {
        Ok(self.inner.database.run(&FetchBundle { account, now, per_day }).await?)
    }

    async fn remove(&self, account: AccountId) -> StoreResult<bool> {
        Ok(self.inner.database.run(&RemoveBundle(account)).await?)
    }

    async fn next_key(&self, after: Option<AtRestKeyId>) -> StoreResult<Option<AtRestKeyId>> {
        Ok(self.inner.database.run(&NextKey(after)).await?)
    }
}

fn state(row: Option<&PgRow>) -> sqlx::Result<BundleState> {
    let Some(row) = row else { return Ok(BundleState::default()) };
    let version = row.unsigned("version")?;
    let sealed: Option<Vec<u8>> = row.try_get("bundle")?;
    let stored_at = row.at("stored_at")?;
    let bundle = sealed.map(|sealed| StoredBundle { version, sealed, stored_at });
    Ok(BundleState { version, bundle })
}

struct FindBundle(AccountId);

impl Statement for FindBundle {
    type Output = BundleState;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "recovery_bundle"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<BundleState> {
        let row = sqlx::query(FIND).bind(self.0.0).fetch_optional(connection).await?;
        state(row.as_ref())
    }
}

struct PutBundle(NewBundle);

impl Statement for PutBundle {
    type Output = BundlePut;

    /// A repeat finds the bundle of the first attempt: sealed bytes are unique.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "put_recovery_bundle"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<BundlePut> {
        let NewBundle { account, replaces, sealed, key, now } = &self.0;
        let written = sqlx::query(if *replaces == 0 { INSERT } else { REPLACE })
            .bind(account.0)
            .bind(number(*replaces))
            .bind(&sealed[..])
            .bind(&key.0[..])
            .bind(millis(*now))
            .execute(&mut *connection)
            .await?;
        if written.rows_affected() > 0 {
            return Ok(BundlePut::Stored);
        }
        let is_repeat: bool = sqlx::query_scalar(IS_REPEAT)
            .bind(account.0)
            .bind(number(*replaces))
            .bind(&sealed[..])
            .fetch_one(connection)
            .await?;
        Ok(if is_repeat { BundlePut::Stored } else { BundlePut::OtherVersion })
    }
}

struct FetchBundle {
    account: AccountId,
    now: UnixMillis,
    per_day: u32,
}

impl Statement for FetchBundle {
    type Output = BundleFetch;

    /// A repeat counts one fetch more.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "fetch_recovery_bundle"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<BundleFetch> {
        let &Self { account, now, per_day } = self;
        let row = sqlx::query(LOCK).bind(account.0).fetch_optional(&mut *connection).await?;
        let BundleState { version, bundle } = state(row.as_ref())?;
        let (Some(row), Some(bundle)) = (row, bundle) else {
            return Ok(BundleFetch::Absent(version));
        };
        let (mut from, mut fetches) = (row.at("counted_from")?, row.unsigned("fetches")?);
        if now >= from.plus(FETCH_DAY) || from > now.plus(FETCH_DAY) {
            (from, fetches) = (now, 0);
        }
        if fetches >= per_day.into() {
            return Ok(BundleFetch::Limited(from.plus(FETCH_DAY).since(now)));
        }
        sqlx::query(COUNT)
            .bind(account.0)
            .bind(millis(from))
            .bind(number(fetches + 1))
            .execute(connection)
            .await?;
        Ok(BundleFetch::Found(bundle))
    }
}

struct RemoveBundle(AccountId);

impl Statement for RemoveBundle {
    type Output = bool;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "remove_recovery_bundle"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<bool> {
        let removed = sqlx::query(REMOVE).bind(self.0.0).execute(connection).await?;
        Ok(removed.rows_affected() > 0)
    }
}

struct NextKey(Option<AtRestKeyId>);

impl Statement for NextKey {
    type Output = Option<AtRestKeyId>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "at_rest_keys"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let after = self.0.map_or(Vec::new(), |key| key.0.to_vec());
        let row = sqlx::query(NEXT_KEY).bind(after).fetch_optional(connection).await?;
        row.as_ref().map(key_id).transpose()
    }
}

fn key_id(row: &PgRow) -> sqlx::Result<AtRestKeyId> {
    let id = row.try_get::<&[u8], _>("key_id")?.try_into();
    Ok(AtRestKeyId(id.map_err(|_| NeverWritten("key_id"))?))
}
