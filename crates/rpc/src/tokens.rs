//! Limits guesses of session tokens: an address with too many unknown tokens is refused without a
//! look-up in the store.
//!
//! Each edge counts separately, in bounded memory and without a store, because the count must cost
//! less than the look-up.
//!
//! A token that the store does not have is remembered for [`UNKNOWN_LIFETIME`] and refused without
//! the store. This cannot hide a session: a token is 32 random bytes that the client receives after
//! the session was stored, so it is not used earlier, and the token of an ended session is never
//! issued again. The lifetime is short, because a restored store may contain the session of an
//! unknown token.

use std::{
    collections::{HashMap, HashSet},
    mem,
    net::IpAddr,
    time::Duration,
};

use parking_lot::Mutex;
use qpq_domain::{TokenHash, UnixMillis};
use qpq_ports::Bucket;

use crate::{Error, limits::network};

/// The time for which an unknown token is refused without the store.
pub(crate) const UNKNOWN_LIFETIME: Duration = Duration::from_secs(5);

/// The maximum number of tokens in each of two generations.
const MAX_TOKENS: usize = 8_192;

/// The maximum number of counted addresses.
const MAX_ADDRESSES: usize = 65_536;

/// The tolerance for rounding errors in sums of times, in milliseconds.
const ROUNDING: f64 = 1_000.0;

/// The unknown tokens by address, and recently used tokens.
#[derive(Debug)]
pub(crate) struct Tokens {
    /// The budget of an address; `None` if guesses are not limited.
    bucket: Option<Bucket>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The time at which the budget of an address is full again, in milliseconds since the epoch.
    full_at: HashMap<[u8; 16], f64>,
    unknown: Unknown,
    /// The tokens of sessions, which stay usable from an address that guesses.
    valid: Generations,
}

/// Unknown tokens, each remembered for half of [`UNKNOWN_LIFETIME`] to all of it.
#[derive(Debug, Default)]
struct Unknown {
    tokens: Generations,
    since: UnixMillis,
}

/// A bounded set of two generations. When the young one is full, the old one is removed.
#[derive(Debug, Default)]
struct Generations {
    young: HashSet<TokenHash>,
    old: HashSet<TokenHash>,
}

impl Tokens {
    pub(crate) fn new(bucket: Option<Bucket>) -> Self {
        Self { bucket, state: Mutex::default() }
    }

    /// Checks whether a token from `ip` may be looked up in the store. `is_bound` means that it is
    /// the token of the connection's session.
    pub(crate) fn admit(
        &self,
        token: &TokenHash,
        is_bound: bool,
        ip: IpAddr,
        now: UnixMillis,
    ) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.unknown.expire(now);
        if state.unknown.tokens.contains(token) {
            return Err(Error::SessionExpired);
        }
        let Some(bucket) = self.bucket else { return Ok(()) };
        if is_bound || state.valid.contains(token) {
            return Ok(());
        }
        let full_at = state.full_at.get(&network(ip)).copied().unwrap_or_default();
        let millis = 1_000.0 / bucket.per_second;
        let missing = (full_at - now.0 as f64).max(0.0);
        // No budget lacks more than its burst, unless the clock was set back.
        let most = f64::from(bucket.burst) * millis + ROUNDING;
        let missing = if missing > most { 0.0 } else { missing };
        let lacking = missing - (f64::from(bucket.burst) - 1.0) * millis;
        if lacking <= 0.0 {
            Ok(())
        } else {
            Err(Error::RateLimited(Duration::from_millis(lacking.ceil() as u64)))
        }
    }

    /// Records a token that the store has.
    pub(crate) fn found(&self, token: TokenHash) {
        self.state.lock().valid.insert(token);
    }

    /// Records a token that the store does not have, and charges it to the budget of `ip`.
    pub(crate) fn not_found(&self, token: TokenHash, ip: IpAddr, now: UnixMillis) {
        let mut state = self.state.lock();
        state.unknown.expire(now);
        state.valid.remove(&token);
        state.unknown.tokens.insert(token);
        let Some(bucket) = self.bucket else { return };
        let (network, now) = (network(ip), now.0 as f64);
        if state.full_at.len() >= MAX_ADDRESSES && !state.full_at.contains_key(&network) {
            make_space(&mut state.full_at, now);
        }
        let millis = 1_000.0 / bucket.per_second;
        let empty = now + f64::from(bucket.burst) * millis;
        let full_at = state.full_at.entry(network).or_insert(now);
        *full_at = (full_at.max(now) + millis).min(empty);
    }
}

/// Removes the addresses whose budget is full. If more than half of the maximum are left, also
/// removes the half of them with the fullest budgets.
fn make_space(full_at: &mut HashMap<[u8; 16], f64>, now: f64) {
    full_at.retain(|_, at| *at > now);
    if full_at.len() > MAX_ADDRESSES / 2 {
        let mut instants: Vec<f64> = full_at.values().copied().collect();
        let middle = instants.len() / 2;
        let median = *instants.select_nth_unstable_by(middle, f64::total_cmp).1;
        full_at.retain(|_, at| *at > median);
    }
}

impl Unknown {
    fn expire(&mut self, now: UnixMillis) {
        let half = UNKNOWN_LIFETIME / 2;
        let age = now.since(self.since);
        if age < half && now >= self.since {
            return;
        }
        self.tokens.rotate();
        if age >= UNKNOWN_LIFETIME || now < self.since {
            self.tokens.rotate();
        }
        self.since = now;
    }
}

impl Generations {
    fn contains(&self, token: &TokenHash) -> bool {
        self.young.contains(token) || self.old.contains(token)
    }

    fn insert(&mut self, token: TokenHash) {
        if self.young.len() >= MAX_TOKENS {
            self.rotate();
        }
        self.young.insert(token);
    }

    fn remove(&mut self, token: &TokenHash) {
        self.young.remove(token);
        self.old.remove(token);
    }

    /// Removes the old generation; the young one replaces it.
    fn rotate(&mut self) {
        self.old = mem::take(&mut self.young);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixMillis = UnixMillis(1_800_000_000_000);
    const BUCKET: Bucket = Bucket { burst: 2, per_second: 1.0 };

    fn token(n: u32) -> TokenHash {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        TokenHash::new(bytes)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn after(time: Duration) -> UnixMillis {
        START.plus(time)
    }

    #[test]
    fn an_address_beyond_its_budget_is_refused_and_other_addresses_are_not() {
        let tokens = Tokens::new(Some(BUCKET));
        let (guesser, neighbour) = (ip("2001:db8::1"), ip("2001:db8::2"));
        for n in 0..2 {
            tokens.admit(&token(n), false, guesser, START).expect("within the budget");
            tokens.not_found(token(n), guesser, START);
        }
        let refused = tokens.admit(&token(2), false, neighbour, START);
        let Err(Error::RateLimited(wait)) = refused else { panic!("{refused:?}") };
        assert_eq!(wait, Duration::from_secs(1));
        tokens.admit(&token(2), false, ip("2001:db8:0:1::1"), START).expect("the next /64");
        tokens.admit(&token(2), false, guesser, after(wait)).expect("after the wait");
    }

    #[test]
    fn known_tokens_stay_usable_from_an_address_that_guesses() {
        let tokens = Tokens::new(Some(BUCKET));
        let shared = ip("192.0.2.1");
        tokens.found(token(1));
        for n in 10..20 {
            tokens.not_found(token(n), shared, START);
        }
        tokens.admit(&token(1), false, shared, START).expect("known to this edge");
        tokens.admit(&token(2), true, shared, START).expect("used by the connection");
        tokens.admit(&token(3), false, shared, START).expect_err("unknown to this edge");
    }

    #[test]
    fn a_clock_that_is_set_back_locks_nobody_out() {
        let tokens = Tokens::new(Some(BUCKET));
        let here = ip("192.0.2.1");
        for n in 0..2 {
            tokens.not_found(token(n), here, after(Duration::from_secs(1_000_000)));
        }
        tokens.admit(&token(3), false, here, START).expect("a full budget");
    }

    #[test]
    fn an_unknown_token_is_refused_without_the_store_for_a_short_time() {
        let tokens = Tokens::new(None);
        let here = ip("192.0.2.1");
        tokens.not_found(token(1), here, START);
        for time in [Duration::ZERO, UNKNOWN_LIFETIME / 2 - Duration::from_millis(1)] {
            let refused = tokens.admit(&token(1), true, here, after(time));
            assert!(matches!(refused, Err(Error::SessionExpired)), "{time:?}");
        }
        tokens.admit(&token(1), false, here, after(UNKNOWN_LIFETIME)).expect("looked up again");
    }

    #[test]
    fn the_numbers_of_remembered_addresses_and_tokens_are_bounded() {
        let tokens = Tokens::new(Some(Bucket { burst: 1, per_second: 0.001 }));
        for n in 0..3 * MAX_ADDRESSES as u32 {
            let address = IpAddr::from(n.to_be_bytes());
            tokens.not_found(token(n), address, START);
            tokens.found(token(n));
        }
        let state = tokens.state.lock();
        assert!(state.full_at.len() <= MAX_ADDRESSES);
        for set in [&state.unknown.tokens, &state.valid] {
            assert!(set.young.len() <= MAX_TOKENS && set.old.len() <= MAX_TOKENS);
        }
    }
}
