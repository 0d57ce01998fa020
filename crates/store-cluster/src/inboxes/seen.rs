//! When devices read.

use std::time::Duration;

use qpq_domain::UnixMillis;
use qpq_ports::StoreResult;
use sqlx::PgConnection;

use super::page::Position;
use crate::postgres::{Database, Repeat, Scope, Statement, row::millis};

/// The precision of [`qpq_ports::Device::last_seen_at`]: a read is recorded if the last one that
/// was is older.
const PRECISION: Duration = Duration::from_secs(10 * 60);

/// Needs no lock of the head: a sweep that moves the device compares this once more when it changes
/// the row. Not later than the store's own time, so that no device seems present because the clock
/// of a caller is ahead.
const SEEN: &str = "
    UPDATE device SET last_seen_at = greatest(last_seen_at, least($2, store_now())) WHERE id = $1";

/// Records that a device reads at `now`, if none of its reads was recorded lately.
pub(super) async fn record(
    database: &Database,
    position: &Position,
    now: UnixMillis,
) -> StoreResult<()> {
    if now.since(position.last_seen_at) <= PRECISION {
        return Ok(());
    }
    Ok(database.run(&See { position, now }).await?)
}

struct See<'a> {
    position: &'a Position,
    now: UnixMillis,
}

impl Statement for See<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "device_seen"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let query = sqlx::query(SEEN).bind(self.position.registration.0).bind(millis(self.now));
        query.execute(connection).await.map(drop)
    }
}
