//! Trust in the clock of this machine: a single node has no other clock to compare it with.
//!
//! The store keeps the newest instant that it trusts to be past, the *believed* instant. A clock
//! that is more than [`JUMP`] ahead of that instant has jumped, and no data is removed by such a
//! clock. A clock that went back by more than [`STEP`] is not believed either: the times for which
//! data is kept then count from the believed instant. While the clock is not believed, the believed
//! instant advances with the monotonic clock. The clock is believed again when it returns, when an
//! operator accepts it, or after it has advanced in step with the monotonic clock for [`JUMP`] of
//! running time, restarts included.
//!
//! The table `clock` stores all of this. Each sweep reads and writes it, so another process can
//! accept the clock while the server runs.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use qpq_domain::UnixMillis;
use sqlx::{Row as _, SqliteConnection};
use tokio::time::Instant;

use crate::{
    metrics as names,
    row::{Columns as _, millis, millis_of},
};

/// Maximum step ahead that is believed: more than an error in the time zone causes.
pub const JUMP: Duration = Duration::from_secs(25 * 3_600);

/// Maximum difference between two clocks that are in step.
const STEP: Duration = Duration::from_secs(60);

const READ: &str = "SELECT believed, shown, proved FROM clock";
const WRITE: &str = "
    INSERT INTO clock (id, believed, shown, proved) VALUES (1, ?1, ?2, ?3)
    ON CONFLICT DO UPDATE SET believed = excluded.believed, shown = excluded.shown,
                              proved = excluded.proved";

/// The stored state of the trust in the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Belief {
    /// The newest instant that the store trusts to be past.
    believed: UnixMillis,
    doubt: Option<Doubt>,
}

/// A clock that is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt {
    /// The instant that the clock showed at the last check.
    shown: UnixMillis,
    /// The running time for which the clock has been in step with the monotonic clock.
    proved: Duration,
}

/// The belief that a check of the clock has stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClockCheck {
    belief: Belief,
    /// The instant that the clock showed.
    shown: UnixMillis,
}

/// The bounds of the present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Data that has not expired at this instant is kept.
    pub(crate) earliest: UnixMillis,
    /// The instant from which the times for keeping data count.
    pub(crate) latest: UnixMillis,
}

/// The belief of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct ClockGuard(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    belief: Option<Belief>,
    /// The instant at which the belief was read or checked.
    since: Instant,
    origin: Origin,
}

/// The source of a belief.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Read at the start.
    Database,
    /// A check of the clock in this process.
    Check,
}

impl Belief {
    /// Returns the belief after the instant `now` was accepted.
    pub(crate) const fn accepted(now: UnixMillis) -> Self {
        Self { believed: now, doubt: None }
    }

    pub(crate) fn believed(&self) -> UnixMillis {
        self.believed
    }

    /// Returns the belief after a check of a clock that shows `now`. `ran` is the time since the
    /// last check, or `None` if the process was started since then.
    fn check(before: Option<Self>, now: UnixMillis, ran: Option<Duration>) -> Self {
        let Some(Self { believed, doubt }) = before else {
            return Self::accepted(now);
        };
        let believed = believed.plus(ran.unwrap_or_default());
        if !jumped(believed, now) {
            return Self::accepted(now);
        }
        let proved = match (doubt, ran) {
            (Some(doubt), Some(ran)) if in_step(doubt.shown.plus(ran), now) => doubt.proved + ran,
            // The time for which the server was stopped is unknown.
            (Some(doubt), None) if !jumped(doubt.shown, now) => doubt.proved,
            _ => Duration::ZERO,
        };
        if proved >= JUMP {
            return Self::accepted(now);
        }
        Self { believed, doubt: Some(Doubt { shown: now, proved }) }
    }

    /// Returns the bounds of the present, `elapsed` after the check, if the clock shows `now`.
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

    pub(crate) async fn write(self, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        let proved = self.doubt.map_or(Duration::ZERO, |doubt| doubt.proved);
        sqlx::query(WRITE)
            .bind(millis(self.believed))
            .bind(self.doubt.map(|doubt| millis(doubt.shown)))
            .bind(millis_of(proved))
            .execute(connection)
            .await
            .map(drop)
    }
}

/// Returns whether a clock that shows `now` has jumped, ahead or back.
fn jumped(believed: UnixMillis, now: UnixMillis) -> bool {
    now > believed.plus(JUMP) || now < believed.minus(STEP)
}

fn in_step(expected: UnixMillis, now: UnixMillis) -> bool {
    expected.since(now).max(now.since(expected)) <= STEP
}

impl ClockGuard {
    pub(crate) fn new(belief: Option<Belief>) -> Self {
        let state = State { belief, since: Instant::now(), origin: Origin::Database };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Returns the bounds of the present, if the clock shows `now`.
    pub(crate) fn bounds(&self, now: UnixMillis) -> Bounds {
        let state = self.0.lock();
        match state.belief {
            Some(belief) => belief.bounds(state.since.elapsed(), now),
            None => Bounds { earliest: now, latest: now },
        }
    }

    /// Returns the time for planning: `now`, which the clock shows, or the believed time while the
    /// clock is not believed.
    pub(crate) fn believed(&self, now: UnixMillis) -> UnixMillis {
        let state = self.0.lock();
        let Some(belief) = state.belief else { return now };
        let believed = belief.believed.plus(state.since.elapsed());
        if jumped(believed, now) { believed } else { now }
    }

    /// Checks the clock, which shows `now`, and stores the belief in the transaction of a sweep.
    /// [`ClockGuard::checked`] applies the result after the commit.
    pub(crate) async fn check(
        &self,
        connection: &mut SqliteConnection,
        now: UnixMillis,
    ) -> sqlx::Result<ClockCheck> {
        let stored = Belief::read(&mut *connection).await?;
        let ran = {
            let state = self.0.lock();
            // The running time is unknown if another process has accepted the clock meanwhile.
            let is_own = state.origin == Origin::Check && state.belief == stored;
            is_own.then(|| state.since.elapsed())
        };
        let belief = Belief::check(stored, now, ran);
        belief.write(connection).await?;
        Ok(ClockCheck { belief, shown: now })
    }

    /// Applies the belief of a committed check, and logs when the clock loses or regains trust.
    pub(crate) fn checked(&self, check: &ClockCheck) {
        let ClockCheck { belief, shown } = *check;
        let mut state = self.0.lock();
        let before = match state.origin {
            Origin::Check => state.belief.and_then(|belief| belief.doubt),
            Origin::Database => None,
        };
        *state = State { belief: Some(belief), since: Instant::now(), origin: Origin::Check };
        drop(state);
        metrics::gauge!(names::CLOCK_DOUBTED).set(f64::from(u8::from(belief.doubt.is_some())));
        match (before, belief.doubt) {
            (None, Some(_)) => tracing::warn!(
                ahead = ?shown.since(belief.believed),
                back = ?belief.believed.since(shown),
                "clock jumped, nothing that has expired is removed: set the clock right, or accept \
                 it with `qpq-admin clock accept`; it is believed after 25 hours in any case"
            ),
            (Some(_), None) => tracing::info!("clock is believed again"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: UnixMillis = UnixMillis(1_800_000_000_000);
    const HOUR: Duration = Duration::from_secs(3_600);
    const MINUTE: Duration = Duration::from_secs(60);

    fn believing(believed: UnixMillis) -> Option<Belief> {
        Some(Belief::accepted(believed))
    }

    /// Checks a clock that advances from `shown`, once each minute.
    fn run(mut belief: Belief, shown: UnixMillis, minutes: u32) -> Belief {
        for minute in 1..=minutes {
            belief = Belief::check(Some(belief), shown.plus(minute * MINUTE), Some(MINUTE));
        }
        belief
    }

    #[test]
    fn the_first_clock_and_one_that_advances_are_believed() {
        assert_eq!(Some(Belief::check(None, NOON, None)), believing(NOON));
        let next = NOON.plus(25 * HOUR);
        assert_eq!(Some(Belief::check(believing(NOON), next, None)), believing(next));
    }

    #[test]
    fn a_clock_that_jumps_is_not_believed_until_it_returns() {
        for shown in [NOON.plus(26 * HOUR), NOON.minus(HOUR)] {
            let doubted = Belief::check(believing(NOON), shown, Some(Duration::ZERO));
            assert!(doubted.doubt.is_some());
            assert_eq!(doubted.believed, NOON);
            let later = run(doubted, shown, 60);
            assert_eq!(later.believed, NOON.plus(HOUR), "the believed time advances");
            let back = Belief::check(Some(later), NOON.plus(HOUR), Some(Duration::ZERO));
            assert_eq!(back.doubt, None);
        }
    }

    #[test]
    fn a_clock_is_believed_after_25_hours_in_step_restarts_included() {
        for shown in [NOON.plus(100 * 24 * HOUR), NOON.minus(100 * 24 * HOUR)] {
            let doubted = Belief::check(believing(NOON), shown, None);
            let half = run(doubted, shown, 12 * 60);
            // The server is stopped for five hours.
            let shown = shown.plus(17 * HOUR);
            let started = Belief::check(Some(half), shown, None);
            let almost = run(started, shown, 13 * 60 - 1);
            assert!(almost.doubt.is_some());
            let done = run(almost, shown.plus((13 * 60 - 1) * MINUTE), 1);
            assert_eq!(done, Belief { believed: shown.plus(13 * HOUR), doubt: None });
        }
    }

    #[test]
    fn a_second_jump_restarts_the_proof() {
        let shown = NOON.plus(100 * 24 * HOUR);
        let doubted = run(Belief::check(believing(NOON), shown, None), shown, 24 * 60);
        for (further, ran) in [(30 * HOUR, Some(MINUTE)), (60 * HOUR, None)] {
            let again = Belief::check(Some(doubted), shown.plus(24 * HOUR + further), ran);
            assert_eq!(again.doubt.map(|doubt| doubt.proved), Some(Duration::ZERO));
        }
    }

    #[test]
    fn data_does_not_expire_by_a_clock_that_is_not_believed() {
        let belief = Belief { believed: NOON, doubt: None };
        let (ahead, one) = (NOON.plus(100 * 24 * HOUR), NOON.plus(HOUR));
        assert_eq!(belief.bounds(HOUR, ahead), Bounds { earliest: one, latest: ahead });
        assert_eq!(belief.bounds(HOUR, NOON), Bounds { earliest: NOON, latest: one });
        let right = one.plus(MINUTE);
        assert_eq!(belief.bounds(HOUR, right), Bounds { earliest: right, latest: right });
    }
}
