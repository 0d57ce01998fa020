//! Recovery bundles in SQLite.

use async_trait::async_trait;
use qpq_domain::{AccountId, UnixMillis};
use qpq_ports::{
    AtRestKeyId, BundleFetch, BundlePut, BundleState, FETCH_DAY, NewBundle, RecoveryBundles,
    StoreResult, StoredBundle,
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use crate::{
    error::{NeverWritten, read_failed},
    row::{Columns as _, millis, number},
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

const FIND: &str = "SELECT version, bundle, stored_at FROM recovery_bundle WHERE account = ?1";

const INSERT: &str = "
    INSERT INTO recovery_bundle (account, version, bundle, key_id, stored_at)
    VALUES (?1, ?2 + 1, ?3, ?4, ?5) ON CONFLICT DO NOTHING";
const REPLACE: &str = "
    UPDATE recovery_bundle SET version = ?2 + 1, bundle = ?3, key_id = ?4, stored_at = ?5
     WHERE account = ?1 AND version = ?2";
const IS_REPEAT: &str = "
    SELECT EXISTS (SELECT 1 FROM recovery_bundle
                    WHERE account = ?1 AND version = ?2 + 1 AND bundle = ?3)";

const COUNTED: &str = "
    SELECT counted_from, fetches FROM recovery_bundle WHERE account = ?1 AND bundle IS NOT NULL";
const COUNT: &str = "
    UPDATE recovery_bundle SET counted_from = ?2, fetches = ?3 WHERE account = ?1";

const REMOVE: &str = "
    UPDATE recovery_bundle SET version = version + 1, bundle = NULL, key_id = NULL
     WHERE account = ?1 AND bundle IS NOT NULL";

const NEXT_KEY: &str = "
    SELECT key_id FROM recovery_bundle WHERE key_id IS NOT NULL AND key_id > ?1
     ORDER BY key_id LIMIT 1";

#[async_trait]
impl RecoveryBundles for EmbeddedStore {
    async fn find(&self, account: AccountId) -> StoreResult<BundleState> {
        let row = sqlx::query(FIND).bind(account.0).fetch_optional(&self.readers).await;
        row.and_then(|row| state(row.as_ref())).map_err(read_failed)
    }

    async fn put(&self, bundle: NewBundle) -> StoreResult<BundlePut> {
        self.writer.run(Put(bundle)).await
    }

    async fn fetch(
        &self,
        account: AccountId,
        now: UnixMillis,
        per_day: u32,
    ) -> StoreResult<BundleFetch> {
        self.writer.run(Fetch { account, now, per_day }).await
    }

    async fn remove(&self, account: AccountId) -> StoreResult<bool> {
        self.writer.run(Remove(account)).await
    }

    async fn next_key(&self, after: Option<AtRestKeyId>) -> StoreResult<Option<AtRestKeyId>> {
        let after = after.map_or(Vec::new(), |key| key.0.to_vec());
        let row = sqlx::query(NEXT_KEY).bind(after).fetch_optional(&self.readers).await;
        row.and_then(|row| row.as_ref().map(key_id).transpose()).map_err(read_failed)
    }
}

fn state(row: Option<&SqliteRow>) -> sqlx::Result<BundleState> {
    let Some(row) = row else { return Ok(BundleState::default()) };
    let version = row.unsigned("version")?;
    let sealed: Option<Vec<u8>> = row.try_get("bundle")?;
    let stored_at = row.at("stored_at")?;
    let bundle = sealed.map(|sealed| StoredBundle { version, sealed, stored_at });
    Ok(BundleState { version, bundle })
}

fn key_id(row: &SqliteRow) -> sqlx::Result<AtRestKeyId> {
    let id = row.try_get::<&[u8], _>("key_id")?.try_into();
    Ok(AtRestKeyId(id.map_err(|_| NeverWritten("key_id"))?))
}

struct Put(NewBundle);

impl Statement for Put {
    type Answer = BundlePut;
    const NAME: &'static str = "put recovery bundle";

    fn bytes(&self) -> usize {
        SMALL + self.0.sealed.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<BundlePut>> {
        let NewBundle { account, replaces, sealed, key, now } = &self.0;
        let written = sqlx::query(if *replaces == 0 { INSERT } else { REPLACE })
            .bind(account.0)
            .bind(number(*replaces))
            .bind(&sealed[..])
            .bind(&key.0[..])
            .bind(millis(*now))
            .execute(&mut *tx)
            .await?;
        if written.rows_affected() > 0 {
            return Ok(Done::keep(BundlePut::Stored));
        }
        let is_repeat: bool = sqlx::query_scalar(IS_REPEAT)
            .bind(account.0)
            .bind(number(*replaces))
            .bind(&sealed[..])
            .fetch_one(tx)
            .await?;
        Ok(Done::keep(if is_repeat { BundlePut::Stored } else { BundlePut::OtherVersion }))
    }
}

struct Fetch {
    account: AccountId,
    now: UnixMillis,
    per_day: u32,
}

impl Statement for Fetch {
    type Answer = BundleFetch;
    const NAME: &'static str = "fetch recovery bundle";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<BundleFetch>> {
        let &Self { account, now, per_day } = self;
        let found = sqlx::query(FIND).bind(account.0).fetch_optional(&mut *tx).await?;
        let BundleState { version, bundle } = state(found.as_ref())?;
        let Some(bundle) = bundle else { return Ok(Done::keep(BundleFetch::Absent(version))) };
        let counted = sqlx::query(COUNTED).bind(account.0).fetch_one(&mut *tx).await?;
        let (mut from, mut fetches) = (counted.at("counted_from")?, counted.unsigned("fetches")?);
        if now >= from.plus(FETCH_DAY) || from > now.plus(FETCH_DAY) {
            (from, fetches) = (now, 0);
        }
        if fetches >= per_day.into() {
            let wait = from.plus(FETCH_DAY).since(now);
            return Ok(Done::keep(BundleFetch::Limited(wait)));
        }
        sqlx::query(COUNT)
            .bind(account.0)
            .bind(millis(from))
            .bind(number(fetches + 1))
            .execute(tx)
            .await?;
        Ok(Done::keep(BundleFetch::Found(bundle)))
    }
}

struct Remove(AccountId);

impl Statement for Remove {
    type Answer = bool;
    const NAME: &'static str = "remove recovery bundle";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<bool>> {
        let removed = sqlx::query(REMOVE).bind(self.0.0).execute(tx).await?;
        Ok(Done::keep(removed.rows_affected() > 0))
    }
}

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 8] =
    [FIND, INSERT, REPLACE, IS_REPEAT, COUNTED, COUNT, REMOVE, NEXT_KEY];
