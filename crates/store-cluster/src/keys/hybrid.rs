//! Hybrid keys in Postgres.

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey};
use qpq_ports::{HybridKey, HybridKeys, StoreResult};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    postgres::{Repeat, Scope, Statement, row::Columns as _},
};

const PUT_HYBRID: &str = "
    INSERT INTO hybrid_key (owner, key, signature) VALUES ($1, $2, $3)
    ON CONFLICT (owner) DO UPDATE SET key = excluded.key, signature = excluded.signature";

const GET_HYBRID: &str = "
    SELECT h.key, h.signature FROM unnest($1::bytea[]) WITH ORDINALITY AS t (identity, place)
      LEFT JOIN account a ON a.identity = t.identity LEFT JOIN hybrid_key h ON h.owner = a.id ORDER BY t.place";

#[async_trait]
impl HybridKeys for ClusterStore {
    async fn put(&self, owner: AccountId, key: HybridKey) -> StoreResult<()> {
        Ok(self.inner.database.run(&PutHybridKey { owner, key: &key }).await?)
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<HybridKey>>> {
        Ok(self.inner.database.run(&GetHybridKeys(targets)).await?)
    }
}

struct PutHybridKey<'a> {
    owner: AccountId,
    key: &'a HybridKey,
}

impl Statement for PutHybridKey<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "put_hybrid_key"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let HybridKey { key, signature } = self.key;
        sqlx::query(PUT_HYBRID)
            .bind(self.owner.0)
            .bind(key)
            .bind(signature.as_ref().map(|signature| &signature[..]))
            .execute(connection)
            .await
            .map(drop)
    }
}

struct GetHybridKeys<'a>(&'a [IdentityKey]);

impl Statement for GetHybridKeys<'_> {
    type Output = Vec<Option<HybridKey>>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "get_hybrid_keys"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let targets: Vec<&[u8]> = self.0.iter().map(|target| &target.as_bytes()[..]).collect();
        let rows = sqlx::query(GET_HYBRID).bind(targets).fetch_all(connection).await?;
        rows.iter().map(hybrid_key).collect()
    }
}

fn hybrid_key(row: &PgRow) -> sqlx::Result<Option<HybridKey>> {
    let key: Option<Vec<u8>> = row.try_get("key")?;
    let signature = row.signature("signature")?;
    Ok(key.map(|key| HybridKey { key, signature }))
}
