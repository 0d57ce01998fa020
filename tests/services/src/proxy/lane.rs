//! One direction of one connection or flow, which decides the fate of its data. This code uses no
//! socket and no clock, so that tests can check the decisions of a seed.

use std::time::Duration;

use rand::{Rng as _, rngs::StdRng};
use tokio::time::{Instant, sleep_until};

use super::{Faults, Way};

/// The maximum time that a datagram waits for a throttle; later ones are lost, as in a full router
/// queue.
const LONGEST_QUEUE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) way: Way,
    random: StdRng,
    /// The due time of the previous data. Data is never due earlier.
    last_due: Instant,
    throttle: Throttle,
}

/// The fate of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Lost,
    Goes { at: Instant, twice: bool, held_back: bool },
}

impl Lane {
    pub(super) fn new(way: Way, random: StdRng, now: Instant) -> Self {
        Self { way, random, last_due: now, throttle: Throttle { free: now } }
    }

    /// Returns the due time of a part of a stream that arrived `now`.
    pub(super) fn due(&mut self, now: Instant, faults: &Faults) -> Instant {
        let jitter = self.random.r#gen();
        self.delayed(now, jitter, faults)
    }

    /// Decides the fate of a datagram. Each decision consumes the same number of random values, so
    /// that a change of one fault does not change the effect of the others.
    pub(super) fn fate(&mut self, now: Instant, bytes: usize, faults: &Faults) -> Fate {
        let [lost, twice, held_back, jitter]: [f64; 4] = self.random.r#gen();
        let queue_full = faults.throttle.is_some() && self.throttle.free > now + LONGEST_QUEUE;
        if faults.blocks(self.way) || lost < faults.loss || queue_full {
            return Fate::Lost;
        }
        let sent = self.throttle.after(now, bytes, faults);
        let held_back = held_back < faults.reordering;
        let mut at = self.delayed(sent, jitter, faults);
        if held_back {
            at += faults.held_back;
        }
        Fate::Goes { at, twice: twice < faults.duplication, held_back }
    }

    fn delayed(&mut self, now: Instant, jitter: f64, faults: &Faults) -> Instant {
        self.last_due = self.last_due.max(now + faults.latency + faults.jitter.mul_f64(jitter));
        self.last_due
    }
}

#[derive(Debug)]
pub(super) struct Throttle {
    /// The time at which all earlier data has passed.
    free: Instant,
}

impl Throttle {
    pub(super) const fn new(now: Instant) -> Self {
        Self { free: now }
    }

    /// Returns the time at which `bytes` have passed, after all earlier data.
    pub(super) fn after(&mut self, now: Instant, bytes: usize, faults: &Faults) -> Instant {
        let Some(rate) = faults.throttle else { return now };
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(rate.get());
        self.free =
            self.free.max(now) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.free
    }
}

/// Waits until `at`. Does not wait for a time in the past, which a timer would round up to a
/// millisecond.
pub(super) async fn until(at: Instant) {
    if at > Instant::now() {
        sleep_until(at).await;
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use rand::SeedableRng as _;

    use super::*;
    use crate::proxy::Link;

    const MS: Duration = Duration::from_millis(1);

    fn fates(seed: u64, faults: &Faults, start: Instant) -> Vec<Fate> {
        let mut lane = Lane::new(Way::ToTarget, StdRng::seed_from_u64(seed), start);
        (0..2_000).map(|i| lane.fate(start + i * MS, 100, faults)).collect()
    }

    #[test]
    fn the_same_seed_yields_the_same_fate_of_each_datagram() {
        let start = Instant::now();
        let faults = Faults {
            jitter: 5 * MS,
            loss: 0.2,
            duplication: 0.1,
            reordering: 0.1,
            held_back: 9 * MS,
            ..Faults::default()
        };
        assert_eq!(fates(1, &faults, start), fates(1, &faults, start));
        assert_ne!(fates(1, &faults, start), fates(2, &faults, start));
        let without =
            Faults { duplication: 0.0, reordering: 0.0, jitter: Duration::ZERO, ..faults };
        let lost = |fates: &[Fate]| fates.iter().map(|f| *f == Fate::Lost).collect::<Vec<_>>();
        assert_eq!(
            lost(&fates(1, &faults, start)),
            lost(&fates(1, &without, start)),
            "one fault does not change the others"
        );
    }

    #[test]
    fn each_fault_occurs_with_its_probability() {
        let start = Instant::now();
        let faults = Faults {
            loss: 0.2,
            duplication: 0.3,
            reordering: 0.1,
            held_back: MS,
            ..Faults::default()
        };
        let fates = fates(7, &faults, start);
        let lost = fates.iter().filter(|f| **f == Fate::Lost).count();
        let twice = fates.iter().filter(|f| matches!(f, Fate::Goes { twice: true, .. })).count();
        let held = fates.iter().filter(|f| matches!(f, Fate::Goes { held_back: true, .. })).count();
        assert!((350..450).contains(&lost), "{lost} of 2000");
        assert!((420..540).contains(&twice), "{twice} of 1600");
        assert!((120..200).contains(&held), "{held} of 1600");
    }

    #[test]
    fn without_faults_datagrams_pass_without_delay() {
        let start = Instant::now();
        for (i, fate) in (0..).zip(fates(3, &Faults::default(), start)) {
            assert_eq!(fate, Fate::Goes { at: start + i * MS, twice: false, held_back: false });
        }
    }

    #[test]
    fn delays_keep_the_order_and_reordering_changes_it() {
        let start = Instant::now();
        let at = |fate: &Fate| match fate {
            Fate::Goes { at, .. } => *at,
            Fate::Lost => unreachable!("nothing is lost here"),
        };
        let delayed = Faults { latency: 10 * MS, jitter: 50 * MS, ..Faults::default() };
        let fates_delayed = fates(3, &delayed, start);
        assert!(fates_delayed.is_sorted_by_key(at));
        for (i, fate) in (0..).zip(&fates_delayed) {
            let delay = at(fate) - (start + i * MS);
            assert!((10 * MS..=60 * MS).contains(&delay), "{delay:?}");
        }
        let held = Faults { reordering: 0.5, held_back: 3 * MS, ..Faults::default() };
        assert!(!fates(3, &held, start).is_sorted_by_key(at));
    }

    #[test]
    fn a_throttle_spaces_simultaneous_datagrams() {
        let start = Instant::now();
        let faults = Faults { throttle: NonZeroU64::new(1_000), ..Faults::default() };
        let mut throttle = Throttle::new(start);
        for i in 1..=5 {
            assert_eq!(throttle.after(start, 100, &faults), start + i * 100 * MS);
        }
        let later = start + 10_000 * MS;
        assert_eq!(
            throttle.after(later, 100, &faults),
            later + 100 * MS,
            "unused capacity is not kept"
        );
    }

    #[test]
    fn datagrams_beyond_the_queue_of_a_throttle_are_lost() {
        let start = Instant::now();
        let faults = Faults { throttle: NonZeroU64::new(1_000), ..Faults::default() };
        let mut lane = Lane::new(Way::ToClient, StdRng::seed_from_u64(1), start);
        let fates: Vec<_> = (0..1_000).map(|_| lane.fate(start, 100, &faults)).collect();
        let passed = fates.iter().take_while(|f| **f != Fate::Lost).count();
        assert_eq!(passed, 11, "the datagrams of one second, and the one at its end");
        assert!(fates[passed..].iter().all(|f| *f == Fate::Lost));
        assert_ne!(
            lane.fate(start + 200 * MS, 100, &faults),
            Fate::Lost,
            "the queue has space again"
        );
    }

    #[test]
    fn a_partition_can_block_one_direction() {
        let way = |link, way| Faults { link, ..Faults::default() }.blocks(way);
        assert!(way(Link::Blackhole(Way::ToTarget), Way::ToTarget));
        assert!(!way(Link::Blackhole(Way::ToTarget), Way::ToClient));
        assert!(way(Link::Blackhole(Way::Both), Way::ToClient));
        assert!(way(Link::Reset, Way::ToClient));
        assert!(!way(Link::Up, Way::ToTarget));
    }
}
