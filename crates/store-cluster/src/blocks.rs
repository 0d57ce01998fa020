//! Blocks in Postgres. A change locks the inbox's head first, as the acceptance of messages does.
//! So each message is decided either before or after a block. The head has the number of blocks:
//! an inbox without any costs an enqueue nothing.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, MAX_BLOCKS, UnixMillis};
use qpq_ports::{Blocking, Blocks, StoreResult, Unblocking};
use sqlx::{PgConnection, Row as _};

use crate::{
    ClusterStore,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
};

const FIND: &str = "SELECT id FROM account WHERE identity = $1";

const LOCK: &str = "SELECT blocks FROM inbox WHERE id = $1 FOR NO KEY UPDATE";
const IS_BLOCKED: &str = "SELECT EXISTS (SELECT 1 FROM block WHERE account = $1 AND blocked = $2)";

const BLOCK: &str = "
    WITH counted AS (UPDATE inbox SET blocks = blocks + 1 WHERE id = $1)
    INSERT INTO block (account, blocked, blocked_at) VALUES ($1, $2, $3)";
const UNBLOCK: &str = "
    WITH removed AS (DELETE FROM block WHERE account = $1 AND blocked = $2 RETURNING account)
    UPDATE inbox SET blocks = blocks - 1 WHERE id IN (SELECT account FROM removed)";

const LIST: &str = "SELECT blocked FROM block WHERE account = $1 ORDER BY blocked";

/// Returns the pairs of $1 inboxes and $2 senders that are blocked, by their places.
const BLOCKED: &str = "
    SELECT k.inbox, k.sender FROM unnest($1::int8[], $2::bytea[]) AS k (inbox, sender)
      JOIN block b ON b.account = k.inbox AND b.blocked = k.sender";

#[async_trait]
impl Blocks for ClusterStore {
    async fn block(
        &self,
        account: AccountId,
        blocked: IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Blocking> {
        Ok(self.inner.database.run(&Block { account, blocked, now }).await?)
    }

    async fn unblock(&self, account: AccountId, blocked: IdentityKey) -> StoreResult<Unblocking> {
        Ok(self.inner.database.run(&Unblock { account, blocked }).await?)
    }

    async fn list(&self, account: AccountId) -> StoreResult<Vec<IdentityKey>> {
        Ok(self.inner.database.run(&ListBlocks(account)).await?)
    }
}

/// Returns the blocked senders of each inbox, of these pairs.
pub(crate) async fn blocked(
    connection: &mut PgConnection,
    pairs: &HashSet<(i64, IdentityKey)>,
) -> sqlx::Result<HashMap<i64, HashSet<IdentityKey>>> {
    let mut blocked: HashMap<i64, HashSet<IdentityKey>> = HashMap::new();
    if pairs.is_empty() {
        return Ok(blocked);
    }
    let inboxes: Vec<i64> = pairs.iter().map(|(inbox, _)| *inbox).collect();
    let senders: Vec<&[u8]> = pairs.iter().map(|(_, sender)| &sender.as_bytes()[..]).collect();
    for row in sqlx::query(BLOCKED).bind(inboxes).bind(senders).fetch_all(connection).await? {
        blocked.entry(row.try_get("inbox")?).or_default().insert(row.identity("sender")?);
    }
    Ok(blocked)
}

async fn find(
    connection: &mut PgConnection,
    identity: &IdentityKey,
) -> sqlx::Result<Option<AccountId>> {
    let query = sqlx::query_scalar(FIND).bind(&identity.as_bytes()[..]);
    Ok(query.fetch_optional(connection).await?.map(AccountId))
}

struct Block {
    account: AccountId,
    blocked: IdentityKey,
    now: UnixMillis,
}

impl Statement for Block {
    type Output = Blocking;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "block"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Blocking> {
        let Some(found) = find(connection, &self.blocked).await? else {
            return Ok(Blocking::NoSuchAccount);
        };
        if found == self.account {
            return Ok(Blocking::OwnAccount);
        }
        let key = &self.blocked.as_bytes()[..];
        let blocks: i32 =
            sqlx::query_scalar(LOCK).bind(self.account.0).fetch_one(&mut *connection).await?;
        let is_blocked = sqlx::query_scalar(IS_BLOCKED).bind(self.account.0).bind(key);
        if is_blocked.fetch_one(&mut *connection).await? {
            return Ok(Blocking::Blocked);
        }
        if usize::try_from(blocks).unwrap_or_default() >= MAX_BLOCKS {
            return Ok(Blocking::Full);
        }
        let query = sqlx::query(BLOCK).bind(self.account.0).bind(key).bind(millis(self.now));
        query.execute(connection).await?;
        Ok(Blocking::Blocked)
    }
}

struct Unblock {
    account: AccountId,
    blocked: IdentityKey,
}

impl Statement for Unblock {
    type Output = Unblocking;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "unblock"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Unblocking> {
        if find(connection, &self.blocked).await?.is_none() {
            return Ok(Unblocking::NoSuchAccount);
        }
        sqlx::query(LOCK).bind(self.account.0).execute(&mut *connection).await?;
        let query = sqlx::query(UNBLOCK).bind(self.account.0);
        query.bind(&self.blocked.as_bytes()[..]).execute(connection).await?;
        Ok(Unblocking::Unblocked)
    }
}

struct ListBlocks(AccountId);

impl Statement for ListBlocks {
    type Output = Vec<IdentityKey>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "blocks"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<IdentityKey>> {
        let rows = sqlx::query(LIST).bind(self.0.0).fetch_all(connection).await?;
        rows.iter().map(|row| row.identity("blocked")).collect()
    }
}
