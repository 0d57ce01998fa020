//! Made-up session tokens: how many of them an address may try before the store is no longer asked.
//!
//! Each edge counts for itself, in bounded memory and without asking anyone: the count has to cost
//! less than what it saves.
//!
//! A token that the store does not know is remembered for [`UNKNOWN_FOR`] and answered without the
//! store. That cannot shadow a session: a token is 32 random bytes which the client gets after the
//! session was stored, so nobody asks for it earlier, and a token whose session ended is never
//! issued again. The time is short all the same, for a store that was restored.

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

/// How long an unknown token is answered without the store.
pub(crate) const UNKNOWN_FOR: Duration = Duration::from_secs(5);

/// Tokens that are remembered, in each of two generations.
const MAX_TOKENS: usize = 8_192;

/// Addresses that are counted.
const MAX_ADDRESSES: usize = 65_536;

/// What sums of times may be off by, in milliseconds.
const ROUNDING: f64 = 1_000.0;

/// The failed tokens of all addresses, and the tokens that were seen lately.
#[derive(Debug)]
pub(crate) struct Tokens {
    /// `None` where nothing is limited.
    bucket: Option<Bucket>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the budget of an address is full again, in milliseconds since the epoch.
    full_at: HashMap<[u8; 16], f64>,
    unknown: Unknown,
    /// Tokens of sessions: those who share an address with a guesser go on with theirs.
    good: Generations,
}

/// Unknown tokens, each remembered for one to two times half of [`UNKNOWN_FOR`].
#[derive(Debug, Default)]
struct Unknown {
    tokens: Generations,
    since: UnixMillis,
}

/// A bounded set that forgets its older half.
#[derive(Debug, Default)]
struct Generations {
    young: HashSet<TokenHash>,
    old: HashSet<TokenHash>,
}

impl Tokens {
    pub(crate) fn new(bucket: Option<Bucket>) -> Self {
        Self { bucket, state: Mutex::default() }
    }

    /// Whether the store is to be asked for a token from `ip`. `is_bound`: the connection has used
    /// it before.
    pub(crate) fn admit(
        &self,
        token: &TokenHash,
        is_bound: bool,
        ip: IpAddr,
        now: UnixMillis,
    ) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.unknown.age(now);
        if state.unknown.tokens.contains(token) {
            return Err(Error::SessionExpired);
        }
        let Some(bucket) = self.bucket else { return Ok(()) };
        if is_bound || state.good.contains(token) {
            return Ok(());
        }
        let full_at = state.full_at.get(&network(ip)).copied().unwrap_or_default();
        let millis = 1_000.0 / bucket.per_second;
        let missing = (full_at - now.0 as f64).max(0.0);
        // No budget lacks more than its burst, unless the clock was put back since.
        let most = f64::from(bucket.burst) * millis + ROUNDING;
        let missing = if missing > most { 0.0 } else { missing };
        let lacking = missing - (f64::from(bucket.burst) - 1.0) * millis;
        if lacking <= 0.0 {
            Ok(())
        } else {
            Err(Error::RateLimited(Duration::from_millis(lacking.ceil() as u64)))
        }
    }

    /// The store knows the token.
    pub(crate) fn found(&self, token: TokenHash) {
        self.state.lock().good.insert(token);
    }

    /// The store does not know the token, which is charged to `ip`.
    pub(crate) fn not_found(&self, token: TokenHash, ip: IpAddr, now: UnixMillis) {
        let mut state = self.state.lock();
        state.unknown.age(now);
        state.good.remove(&token);
        state.unknown.tokens.insert(token);
        let Some(bucket) = self.bucket else { return };
        let (network, now) = (network(ip), now.0 as f64);
        if state.full_at.len() >= MAX_ADDRESSES && !state.full_at.contains_key(&network) {
            make_room(&mut state.full_at, now);
        }
        let millis = 1_000.0 / bucket.per_second;
        let empty = now + f64::from(bucket.burst) * millis;
        let full_at = state.full_at.entry(network).or_insert(now);
        *full_at = (full_at.max(now) + millis).min(empty);
    }
}

/// Forgets the addresses whose budget is full; if none is, the half that is charged least.
fn make_room(full_at: &mut HashMap<[u8; 16], f64>, now: f64) {
    full_at.retain(|_, at| *at > now);
    if full_at.len() > MAX_ADDRESSES / 2 {
        let mut instants: Vec<f64> = full_at.values().copied().collect();
        let middle = instants.len() / 2;
        let median = *instants.select_nth_unstable_by(middle, f64::total_cmp).1;
        full_at.retain(|_, at| *at > median);
    }
}

impl Unknown {
    fn age(&mut self, now: UnixMillis) {
        let half = UNKNOWN_FOR / 2;
        let age = now.since(self.since);
        if age < half && now >= self.since {
            return;
        }
        self.tokens.turn();
        if age >= UNKNOWN_FOR || now < self.since {
            self.tokens.turn();
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
            self.turn();
        }
        self.young.insert(token);
    }

    fn remove(&mut self, token: &TokenHash) {
        self.young.remove(token);
        self.old.remove(token);
    }

    /// Forgets the old generation; the young one becomes it.
    fn turn(&mut self) {
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
    fn an_address_may_fail_so_often_and_another_is_not_charged() {
        let tokens = Tokens::new(Some(BUCKET));
        let (greedy, neighbour) = (ip("2001:db8::1"), ip("2001:db8::2"));
        for n in 0..2 {
            tokens.admit(&token(n), false, greedy, START).expect("within the budget");
            tokens.not_found(token(n), greedy, START);
        }
        let refused = tokens.admit(&token(2), false, neighbour, START);
        let Err(Error::RateLimited(wait)) = refused else { panic!("{refused:?}") };
        assert_eq!(wait, Duration::from_secs(1));
        tokens.admit(&token(2), false, ip("2001:db8:0:1::1"), START).expect("the next /64");
        tokens.admit(&token(2), false, greedy, after(wait)).expect("after the wait");
    }

    #[test]
    fn known_tokens_of_a_guessers_address_go_on() {
        let tokens = Tokens::new(Some(BUCKET));
        let shared = ip("192.0.2.1");
        tokens.found(token(1));
        for n in 10..20 {
            tokens.not_found(token(n), shared, START);
        }
        tokens.admit(&token(1), false, shared, START).expect("seen by this edge");
        tokens.admit(&token(2), true, shared, START).expect("used by the connection");
        tokens.admit(&token(3), false, shared, START).expect_err("not seen before");
    }

    #[test]
    fn a_clock_that_is_put_back_shuts_nobody_out() {
        let tokens = Tokens::new(Some(BUCKET));
        let here = ip("192.0.2.1");
        for n in 0..2 {
            tokens.not_found(token(n), here, after(Duration::from_secs(1_000_000)));
        }
        tokens.admit(&token(3), false, here, START).expect("a full budget");
    }

    #[test]
    fn an_unknown_token_is_remembered_for_a_short_time() {
        let tokens = Tokens::new(None);
        let here = ip("192.0.2.1");
        tokens.not_found(token(1), here, START);
        for time in [Duration::ZERO, UNKNOWN_FOR / 2 - Duration::from_millis(1)] {
            let refused = tokens.admit(&token(1), true, here, after(time));
            assert!(matches!(refused, Err(Error::SessionExpired)), "{time:?}");
        }
        tokens.admit(&token(1), false, here, after(UNKNOWN_FOR)).expect("the store is asked again");
    }

    #[test]
    fn memory_is_bounded() {
        let tokens = Tokens::new(Some(Bucket { burst: 1, per_second: 0.001 }));
        for n in 0..3 * MAX_ADDRESSES as u32 {
            let address = IpAddr::from(n.to_be_bytes());
            tokens.not_found(token(n), address, START);
            tokens.found(token(n));
        }
        let state = tokens.state.lock();
        assert!(state.full_at.len() <= MAX_ADDRESSES);
        for set in [&state.unknown.tokens, &state.good] {
            assert!(set.young.len() <= MAX_TOKENS && set.old.len() <= MAX_TOKENS);
        }
    }
}
