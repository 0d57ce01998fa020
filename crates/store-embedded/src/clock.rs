//! Whether the clock of this machine is believed, for a single node has no other to ask.
//!
//! The store keeps the newest instant that it believes to have come. A clock that shows more than
//! [`JUMP`] beyond it has jumped: nothing is destroyed by what it shows. A clock that went back by
//! more than [`STEP`] is not believed either: promises count from the time that was believed.
//! Meanwhile the believed time goes on with the monotonic clock. A clock that is not believed is
//! believed again when it returns, when an operator accepts it, or once it has gone in step with
//! the monotonic clock for [`JUMP`] of running time, restarts included.
//!
//! The table `clock` has all of it; each sweep reads and writes it, so another process can accept
//! the clock while the server runs.

use std::{path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use qpq_domain::UnixMillis;
use sqlx::{ConnectOptions as _, Row as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::time::Instant;

use crate::{
    metrics as names,
    open::{DATABASE_FILE, OpenError, check_current, failed},
    row::{Columns as _, millis},
};

/// Maximum step ahead that is believed: more than any mistake in a time zone.
pub const JUMP: Duration = Duration::from_secs(25 * 3_600);
/// Difference between two clocks that counts as none.
const STEP: Duration = Duration::from_secs(60);

const READ: &str = "SELECT believed, shown, proved FROM clock";
const WRITE: &str = "
    INSERT INTO clock (id, believed, shown, proved) VALUES (1, ?1, ?2, ?3)
    ON CONFLICT DO UPDATE SET believed = excluded.believed, shown = excluded.shown, proved = excluded.proved";

/// What is stored about the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Belief {
    /// The newest instant that is believed to have come.
    believed: UnixMillis,
    doubt: Option<Doubt>,
}

/// A clock that is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt {
    /// What it showed last.
    shown: UnixMillis,
    /// Running time for which it has gone in step with the monotonic clock.
    proved: Duration,
}

/// The bounds of the present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Data that has not expired at this instant is kept.
    pub(crate) earliest: UnixMillis,
    /// The instant from which a promise to keep data counts.
    pub(crate) latest: UnixMillis,
}

/// The belief of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Guard(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    belief: Option<Belief>,
    /// Since when, and whether a look at the clock led to it.
    since: Instant,
    looked: bool,
}

impl Belief {
    /// The belief after a look at a clock that shows `now`. `ran` is the time since the last look,
    /// unless the process has been started since.
    fn look(before: Option<Self>, now: UnixMillis, ran: Option<Duration>) -> Self {
        let Some(Self { believed, doubt }) = before else {
            return Self { believed: now, doubt: None };
        };
        let believed = believed.plus(ran.unwrap_or_default());
        if !jumped(believed, now) {
            return Self { believed: now, doubt: None };
        }
        let proved = match (doubt, ran) {
            (Some(doubt), Some(ran)) if in_step(doubt.shown.plus(ran), now) => doubt.proved + ran,
            // How long the server was stopped is unknown.
            (Some(doubt), None) if !jumped(doubt.shown, now) => doubt.proved,
            _ => Duration::ZERO,
        };
        if proved >= JUMP {
            return Self { believed: now, doubt: None };
        }
        Self { believed, doubt: Some(Doubt { shown: now, proved }) }
    }

    /// The bounds of the present, `elapsed` after the look, where the clock shows `now`.
    fn bounds(self, elapsed: Duration, now: UnixMillis) -> Bounds {
        let believed = self.believed.plus(elapsed);
        if jumped(believed, now) {
            Bounds { earliest: now.min(believed), latest: now.max(believed) }
        } else {
            Bounds { earliest: now, latest: now }
        }
    }

    pub(crate) async fn read(connection: &mut SqliteConnection) -> sqlx::Result<Option<Self>> {
        let Some(row) = sqlx::query(READ).fetch_optional(connection).await? else {
            return Ok(None);
        };
        let doubt = match row.try_get::<Option<i64>, _>("shown")? {
            None => None,
            Some(_) => Some(Doubt {
                shown: row.at("shown")?,
                proved: Duration::from_millis(row.unsigned("proved")?),
            }),
        };
        Ok(Some(Self { believed: row.at("believed")?, doubt }))
    }

    async fn write(self, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        let proved = self.doubt.map_or(Duration::ZERO, |doubt| doubt.proved);
        sqlx::query(WRITE)
            .bind(millis(self.believed))
            .bind(self.doubt.map(|doubt| millis(doubt.shown)))
            .bind(i64::try_from(proved.as_millis()).unwrap_or(i64::MAX))
            .execute(connection)
            .await
            .map(drop)
    }
}

/// Whether a clock that shows `now` has jumped, ahead or back.
fn jumped(believed: UnixMillis, now: UnixMillis) -> bool {
    now > believed.plus(JUMP) || now < believed.minus(STEP)
}

fn in_step(expected: UnixMillis, now: UnixMillis) -> bool {
    expected.since(now).max(now.since(expected)) <= STEP
}

impl Guard {
    pub(crate) fn new(belief: Option<Belief>) -> Self {
        Self(Arc::new(Mutex::new(State { belief, since: Instant::now(), looked: false })))
    }

    /// The bounds of the present, where the clock shows `now`.
    pub(crate) fn bounds(&self, now: UnixMillis) -> Bounds {
        let state = self.0.lock();
        match state.belief {
            Some(belief) => belief.bounds(state.since.elapsed(), now),
            None => Bounds { earliest: now, latest: now },
        }
    }

    /// Looks at the clock, which shows `now`; in the transaction of a sweep. Returns the belief for
    /// [`Guard::looked`], once that is committed.
    pub(crate) async fn look(
        &self,
        connection: &mut SqliteConnection,
        now: UnixMillis,
    ) -> sqlx::Result<Belief> {
        let stored = Belief::read(&mut *connection).await?;
        let ran = {
            let state = self.0.lock();
            // Not if another process has accepted the clock meanwhile.
            (state.looked && state.belief == stored).then(|| state.since.elapsed())
        };
        let belief = Belief::look(stored, now, ran);
        belief.write(connection).await?;
        Ok(belief)
    }

    pub(crate) fn looked(&self, belief: Belief, now: UnixMillis) {
        let mut state = self.0.lock();
        let before = state.belief.and_then(|belief| belief.doubt).filter(|_| state.looked);
        *state = State { belief: Some(belief), since: Instant::now(), looked: true };
        drop(state);
        metrics::gauge!(names::CLOCK_DOUBTED).set(f64::from(u8::from(belief.doubt.is_some())));
        match (before, belief.doubt) {
            (None, Some(_)) => tracing::warn!(
                ahead = ?now.since(belief.believed),
                back = ?belief.believed.since(now),
                "the clock jumped, nothing that has expired is removed: set the clock right, or \
                 accept it with `qpq-admin clock accept`; it is believed by itself after 25 hours"
            ),
            (Some(_), None) => tracing::info!("the clock is believed again"),
            _ => {}
        }
    }
}

/// What accepting the clock changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The time believed before; none if nothing is stored.
    pub before: Option<UnixMillis>,
    pub now: UnixMillis,
}

/// Makes a store believe that it is `now`, whether or not a server is running on it. A running
/// server follows with its next sweep.
pub async fn accept_clock(data_dir: &Path, now: UnixMillis) -> Result<Accepted, OpenError> {
    let path = data_dir.join(DATABASE_FILE);
    let failed = |error: sqlx::Error| failed(&path, &error);
    let options = SqliteConnectOptions::new()
        .filename(&path)
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    check_current(&mut connection, &path).await?;
    let before = Belief::read(&mut connection).await.map_err(failed)?;
    let belief = Belief { believed: now, doubt: None };
    belief.write(&mut connection).await.map_err(failed)?;
    sqlx::Connection::close(connection).await.map_err(failed)?;
    Ok(Accepted { before: before.map(|belief| belief.believed), now })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: UnixMillis = UnixMillis(1_800_000_000_000);
    const HOUR: Duration = Duration::from_secs(3_600);
    const MINUTE: Duration = Duration::from_secs(60);

    fn believing(believed: UnixMillis) -> Option<Belief> {
        Some(Belief { believed, doubt: None })
    }

    /// Looks every minute at a clock that goes on from `shown`.
    fn run(mut belief: Belief, shown: UnixMillis, minutes: u32) -> Belief {
        for minute in 1..=minutes {
            belief = Belief::look(Some(belief), shown.plus(minute * MINUTE), Some(MINUTE));
        }
        belief
    }

    #[test]
    fn a_clock_is_believed_first_and_while_it_goes_on() {
        assert_eq!(Some(Belief::look(None, NOON, None)), believing(NOON));
        let next = NOON.plus(25 * HOUR);
        assert_eq!(Some(Belief::look(believing(NOON), next, None)), believing(next));
    }

    #[test]
    fn a_clock_that_jumps_is_doubted_until_it_returns() {
        for shown in [NOON.plus(26 * HOUR), NOON.minus(HOUR)] {
            let doubted = Belief::look(believing(NOON), shown, Some(Duration::ZERO));
            assert!(doubted.doubt.is_some());
            assert_eq!(doubted.believed, NOON);
            let later = run(doubted, shown, 60);
            assert_eq!(later.believed, NOON.plus(HOUR), "it goes on by itself");
            let back = Belief::look(Some(later), NOON.plus(HOUR), Some(Duration::ZERO));
            assert_eq!(back.doubt, None);
        }
    }

    #[test]
    fn a_clock_is_believed_after_25_hours_in_step_restarts_included() {
        for shown in [NOON.plus(100 * 24 * HOUR), NOON.minus(100 * 24 * HOUR)] {
            let doubted = Belief::look(believing(NOON), shown, None);
            let half = run(doubted, shown, 12 * 60);
            // Stopped for five hours.
            let shown = shown.plus(17 * HOUR);
            let started = Belief::look(Some(half), shown, None);
            let almost = run(started, shown, 13 * 60 - 1);
            assert!(almost.doubt.is_some());
            let done = run(almost, shown.plus((13 * 60 - 1) * MINUTE), 1);
            assert_eq!(done, Belief { believed: shown.plus(13 * HOUR), doubt: None });
        }
    }

    #[test]
    fn a_clock_that_jumps_again_has_proved_nothing() {
        let shown = NOON.plus(100 * 24 * HOUR);
        let doubted = run(Belief::look(believing(NOON), shown, None), shown, 24 * 60);
        for (further, ran) in [(30 * HOUR, Some(MINUTE)), (60 * HOUR, None)] {
            let again = Belief::look(Some(doubted), shown.plus(24 * HOUR + further), ran);
            assert_eq!(again.doubt.map(|doubt| doubt.proved), Some(Duration::ZERO));
        }
    }

    #[test]
    fn nothing_expires_by_a_clock_that_is_doubted() {
        let belief = Belief { believed: NOON, doubt: None };
        let (ahead, one) = (NOON.plus(100 * 24 * HOUR), NOON.plus(HOUR));
        assert_eq!(belief.bounds(HOUR, ahead), Bounds { earliest: one, latest: ahead });
        assert_eq!(belief.bounds(HOUR, NOON), Bounds { earliest: NOON, latest: one });
        let right = one.plus(MINUTE);
        assert_eq!(belief.bounds(HOUR, right), Bounds { earliest: right, latest: right });
    }
}
