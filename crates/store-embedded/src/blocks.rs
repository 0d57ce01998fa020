//! Blocks in SQLite. Triggers count the blocks of an inbox. The statements of `messages` check
//! them for an inbox that has any.

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, MAX_BLOCKS, UnixMillis};
use qpq_ports::{Blocking, Blocks, StoreResult, Unblocking};
use sqlx::{Row as _, SqliteConnection};

use crate::{
    error::read_failed,
    row::{Columns as _, millis},
    statement::{Done, Statement},
    store::EmbeddedStore,
};

/// Selects the account with the identity key ?2, and the state of the blocks of the account ?1.
const STATE: &str = "
    SELECT a.id AS account, i.blocks,
           EXISTS (SELECT 1 FROM block b WHERE b.account = ?1 AND b.blocked = ?2) AS is_blocked
      FROM account a CROSS JOIN inbox i ON i.id = ?1
     WHERE a.identity = ?2";

const BLOCK: &str = "INSERT INTO block (account, blocked, blocked_at) VALUES (?1, ?2, ?3)";
const UNBLOCK: &str = "DELETE FROM block WHERE account = ?1 AND blocked = ?2";
const LIST: &str = "
    SELECT blocked FROM block WHERE account = ?1 ORDER BY blocked";

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 4] = [STATE, BLOCK, UNBLOCK, LIST];

#[async_trait]
impl Blocks for EmbeddedStore {
    async fn block(
        &self,
        account: AccountId,
        blocked: IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Blocking> {
        self.writer.run(Block { account, blocked, now }).await
    }

    async fn unblock(&self, account: AccountId, blocked: IdentityKey) -> StoreResult<Unblocking> {
        self.writer.run(Unblock { account, blocked }).await
    }

    async fn list(&self, account: AccountId) -> StoreResult<Vec<IdentityKey>> {
        let rows = sqlx::query(LIST).bind(account.0).fetch_all(&self.readers).await;
        rows.and_then(|rows| rows.iter().map(|row| row.identity("blocked")).collect())
            .map_err(read_failed)
    }
}

struct Block {
    account: AccountId,
    blocked: IdentityKey,
    now: UnixMillis,
}

impl Statement for Block {
    type Answer = Blocking;
    const NAME: &'static str = "block";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Blocking>> {
        let key = &self.blocked.as_bytes()[..];
        let query = sqlx::query(STATE).bind(self.account.0).bind(key);
        let Some(row) = query.fetch_optional(&mut *tx).await? else {
            return Ok(Done::keep(Blocking::NoSuchAccount));
        };
        if row.account("account")? == self.account {
            return Ok(Done::keep(Blocking::OwnAccount));
        }
        if row.try_get("is_blocked")? {
            return Ok(Done::keep(Blocking::Blocked));
        }
        if row.unsigned("blocks")? >= MAX_BLOCKS as u64 {
            return Ok(Done::keep(Blocking::Full));
        }
        let query = sqlx::query(BLOCK).bind(self.account.0).bind(key).bind(millis(self.now));
        query.execute(tx).await?;
        Ok(Done::keep(Blocking::Blocked))
    }
}

struct Unblock {
    account: AccountId,
    blocked: IdentityKey,
}

impl Statement for Unblock {
    type Answer = Unblocking;
    const NAME: &'static str = "unblock";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Unblocking>> {
        let key = &self.blocked.as_bytes()[..];
        let query = sqlx::query(STATE).bind(self.account.0).bind(key);
        if query.fetch_optional(&mut *tx).await?.is_none() {
            return Ok(Done::keep(Unblocking::NoSuchAccount));
        }
        sqlx::query(UNBLOCK).bind(self.account.0).bind(key).execute(tx).await?;
        Ok(Done::keep(Unblocking::Unblocked))
    }
}
