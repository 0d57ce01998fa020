//! The time of each device's last read.

use std::time::Duration;

use qpq_domain::UnixMillis;
use qpq_ports::StoreResult;
use sqlx::PgConnection;

use super::page::Position;
use crate::postgres::{Database, Repeat, Scope, Statement, row::millis};

/// The precision of [`qpq_ports::Device::last_seen_at`]: a read is recorded only if the last
/// recorded one is older than this.
const PRECISION: Duration = Duration::from_secs(10 * 60);

/// Needs no lock of the head, because a sweep that moves the device checks `last_seen_at` again
/// when it changes the row. The instant is at most the store's own time, so that a caller's clock
/// that is ahead does not make an absent device look present.
const SEEN: &str = "
    UPDATE device SET last_seen_at = greatest(last_seen_at, least($2, store_now())) WHERE id = $1";

/// Records that a device reads at `now`, unless a read within [`PRECISION`] is recorded.
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
