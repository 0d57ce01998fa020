//! Rate limits: which budget a call is taken from, and what happens when counting itself fails.
//!
//! The classes and their defaults are one table in `qpq_proto::limits`; the configuration overrides
//! budgets by class and key. The dispatcher takes what it can know by itself (address, account); a
//! handler takes the rest (username, target) through [`Cx::limit`](crate::Cx::limit) as soon as it
//! has read it.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use parking_lot::Mutex;
use qpq_domain::{AccountId, IdentityKey, UnixMillis, Username};
use qpq_ports::{Bucket, LimitKey, Verdict};
use qpq_proto::{LimitClass, LimitDefault, LimitSubject};
use sha2::{Digest, Sha256};

use crate::{Cx, Error};

/// How calls are limited, as configured.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimits {
    /// False lets everything through.
    pub enabled: bool,
    /// Budgets in place of the table's, or besides them.
    pub overrides: HashMap<(LimitClass, LimitSubject), Bucket>,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self { enabled: true, overrides: HashMap::new() }
    }
}

/// Whom a budget counts.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    Ip(IpAddr),
    Username(&'a Username),
    /// A user name, and the address it is asked for from.
    UsernameAndIp(&'a Username, IpAddr),
    Account(AccountId),
    /// An account, and the identity it asks for.
    Target(AccountId, &'a IdentityKey),
}

/// The budgets in force, looked up by class without hashing.
#[derive(Debug)]
pub(crate) struct Limits {
    enabled: bool,
    budgets: Vec<Vec<(LimitSubject, Bucket)>>,
}

impl Limits {
    pub(crate) fn new(config: &RateLimits) -> Self {
        let budgets = LimitClass::ALL.map(|class| {
            let mut budgets: HashMap<_, _> = class.defaults().iter().map(default_budget).collect();
            let overrides = config.overrides.iter().filter(|((of, _), _)| *of == class);
            budgets.extend(overrides.map(|((_, per), bucket)| (*per, *bucket)));
            budgets.into_iter().collect()
        });
        Self { enabled: config.enabled, budgets: budgets.into() }
    }

    pub(crate) fn bucket(&self, class: LimitClass, per: LimitSubject) -> Option<Bucket> {
        let budgets = if self.enabled { self.budgets.get(class as usize)? } else { return None };
        budgets.iter().find(|(of, _)| *of == per).map(|(_, bucket)| *bucket)
    }

    /// How much of `cost` the budget of `class` kept for `subject` can ever pay after a call.
    pub(crate) fn payable(&self, class: LimitClass, subject: &Subject<'_>, cost: u32) -> u32 {
        let bucket = self.bucket(class, subject.kept_per());
        bucket.map_or(cost, |bucket| cost.min(bucket.burst.saturating_sub(1)))
    }

    /// Takes `cost` of `class` from `subject`'s budget, if the class has one kept by that.
    pub(crate) async fn take(
        &self,
        cx: Cx<'_>,
        class: LimitClass,
        subject: Subject<'_>,
        cost: u32,
    ) -> Result<(), Error> {
        let Some(bucket) = self.bucket(class, subject.kept_per()) else { return Ok(()) };
        let key = LimitKey { class: class.name(), subject: subject.to_bytes() };
        match cx.app.stores.limiter.take(key, bucket, cost, cx.now).await {
            Ok(Verdict::Allowed) => Ok(()),
            Ok(Verdict::RetryAfter(wait)) => Err(Error::RateLimited(wait)),
            Err(error) if stands_without_limits(class) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "rate limits could not be counted"
                );
                Ok(())
            }
            Err(error) => Err(Error::Unavailable(error)),
        }
    }
}

/// How long an address counts as one that has logged in by a name.
const ADDRESS_KNOWN_FOR: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// The class of the keys under which addresses are remembered.
const KNOWN_ADDRESS: &str = "login_address";

fn known_address(cx: Cx<'_>, name: &Username) -> LimitKey {
    let subject = Subject::UsernameAndIp(name, cx.conn.ip()).to_bytes();
    LimitKey { class: KNOWN_ADDRESS, subject }
}

/// Takes one login from the budgets of `name`.
///
/// The budget of the name alone counts only addresses that have not logged in by it: strangers who
/// use it up do not lock the user out at home, and those at one address use up no more than their
/// own budget of the name. All of it depends on the name as given and on the address, never on
/// whether the account exists.
pub(crate) async fn take_login(cx: Cx<'_>, name: &Username) -> Result<(), Error> {
    cx.limit(LimitClass::Login, Subject::UsernameAndIp(name, cx.conn.ip())).await?;
    if cx.app.limits.bucket(LimitClass::Login, LimitSubject::Username).is_none() {
        return Ok(());
    }
    // Where that cannot be asked, nothing can be counted either.
    let is_known = cx.app.stores.limiter.remembers(known_address(cx, name), cx.now).await?;
    if is_known { Ok(()) } else { cx.limit(LimitClass::Login, Subject::Username(name)).await }
}

/// Remembers that the client's address has logged in by `name`. Without it the address counts as a
/// stranger, so a failure fails no login.
pub(crate) async fn remember_login(cx: Cx<'_>, name: &Username) {
    if !cx.app.limits.enabled {
        return;
    }
    let remembered =
        cx.app.stores.limiter.remember(known_address(cx, name), ADDRESS_KNOWN_FOR, cx.now).await;
    if let Err(error) = remembered {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the address of a login could not be remembered"
        );
    }
}

/// What calls have cost that their accounts have yet to pay for, here on this server: the next call
/// of the class does. How much a read shows is known only when it is done; and a batch may cost more
/// than its budget ever holds beside the call itself.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    accounts: Mutex<HashMap<(LimitClass, AccountId), Debt>>,
}

#[derive(Debug, Default)]
struct Debt {
    cost: u32,
    since: UnixMillis,
}

/// From how many accounts on those are forgotten whose debt their budget would have paid by now.
const MANY_DEBTS: usize = 1_024;
const DEBT_LASTS: Duration = Duration::from_secs(60);

impl Owed {
    /// What the account owes; from now on, nothing.
    pub(crate) fn collect(&self, class: LimitClass, account: AccountId) -> u32 {
        self.accounts.lock().remove(&(class, account)).map_or(0, |debt| debt.cost)
    }

    /// Adds to what the account owes.
    pub(crate) fn add(&self, class: LimitClass, account: AccountId, cost: u32, now: UnixMillis) {
        if cost == 0 {
            return;
        }
        let mut accounts = self.accounts.lock();
        let is_full = accounts.len() >= MANY_DEBTS && accounts.len() == accounts.capacity();
        let key = (class, account);
        if is_full && !accounts.contains_key(&key) {
            accounts.retain(|_, debt| now.since(debt.since) < DEBT_LASTS);
        }
        let debt = accounts.entry(key).or_default();
        *debt = Debt { cost: debt.cost.saturating_add(cost), since: now };
    }
}

/// Where nobody can be counted, a message still gets through, but no password is guessed and no
/// account made.
const fn stands_without_limits(class: LimitClass) -> bool {
    !matches!(class, LimitClass::Login | LimitClass::Register | LimitClass::Recovery)
}

fn default_budget(budget: &LimitDefault) -> (LimitSubject, Bucket) {
    (budget.subject, Bucket { burst: budget.burst, per_second: budget.per_second() })
}

impl Subject<'_> {
    const fn kept_per(&self) -> LimitSubject {
        match self {
            Self::Ip(_) => LimitSubject::Ip,
            Self::Username(_) => LimitSubject::Username,
            Self::UsernameAndIp(..) => LimitSubject::UsernameAndIp,
            Self::Account(_) => LimitSubject::Account,
            Self::Target(..) => LimitSubject::FetcherAndTarget,
        }
    }

    /// 16 bytes that stand for the subject; what is personal is hashed. Kinds never meet: each has
    /// its own first bytes.
    fn to_bytes(self) -> [u8; 16] {
        match self {
            Self::Ip(ip) => network(ip),
            Self::Account(AccountId(id)) => account(id),
            Self::Username(name) => tagged(b"username", &[name.as_str().as_bytes()]),
            Self::UsernameAndIp(name, ip) => {
                tagged(b"username and ip", &[&network(ip), name.as_str().as_bytes()])
            }
            Self::Target(AccountId(id), target) => {
                tagged(b"target", &[&id.to_be_bytes(), target.as_bytes()])
            }
        }
    }
}

/// What counts as one address, see [`prefix`].
pub(crate) fn network(ip: IpAddr) -> [u8; 16] {
    prefix(ip).octets()
}

/// An IPv4 address as it is; of an IPv6 address the /64, which is what one customer gets at the
/// least.
fn prefix(ip: IpAddr) -> Ipv6Addr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0)
        }
    }
}

/// The number behind eight bytes that no address of a client begins with (multicast, RFC 4291).
fn account(id: i64) -> [u8; 16] {
    let mut bytes = [0xff; 16];
    bytes[8..].copy_from_slice(&id.to_be_bytes());
    bytes
}

fn tagged(kind: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(b"qpq/limit/1 ");
    hash.update(kind);
    for part in parts {
        hash.update(part);
    }
    *hash.finalize().first_chunk().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn budgets_are_found_by_their_class() {
        let limits = Limits::new(&RateLimits::default());
        for class in LimitClass::ALL {
            for budget in class.defaults() {
                let (per, bucket) = default_budget(budget);
                assert_eq!(limits.bucket(class, per), Some(bucket), "{class:?}");
            }
        }
        let off = Limits::new(&RateLimits { enabled: false, ..RateLimits::default() });
        assert_eq!(off.bucket(LimitClass::Health, LimitSubject::Ip), None);
    }

    #[test]
    fn an_override_replaces_a_budget_or_adds_one() {
        let bucket = Bucket { burst: 1, per_second: 2.0 };
        let places =
            [(LimitClass::Health, LimitSubject::Ip), (LimitClass::Health, LimitSubject::Account)];
        let config =
            RateLimits { enabled: true, overrides: places.map(|place| (place, bucket)).into() };
        let limits = Limits::new(&config);
        for (class, per) in places {
            assert_eq!(limits.bucket(class, per), Some(bucket));
        }
        assert_ne!(limits.bucket(LimitClass::Login, LimitSubject::Ip), Some(bucket));
    }

    #[test]
    fn a_debt_is_collected_once_and_forgotten_when_it_is_old_and_there_are_many() {
        let owed = Owed::default();
        let (now, later) = (UnixMillis(1_000_000), UnixMillis(1_000_000).plus(DEBT_LASTS));
        owed.add(LimitClass::Send, AccountId(1), 0, now);
        assert!(owed.accounts.lock().is_empty());
        owed.add(LimitClass::Send, AccountId(1), 2, now);
        owed.add(LimitClass::Send, AccountId(1), 3, now);
        assert_eq!(owed.collect(LimitClass::Receive, AccountId(1)), 0);
        assert_eq!(owed.collect(LimitClass::Send, AccountId(1)), 5);
        assert_eq!(owed.collect(LimitClass::Send, AccountId(1)), 0);
        for n in 0.. {
            owed.add(LimitClass::Send, AccountId(n), 1, now);
            let accounts = owed.accounts.lock();
            if accounts.len() > MANY_DEBTS && accounts.len() == accounts.capacity() {
                break;
            }
        }
        owed.add(LimitClass::Send, AccountId(0), 1, later);
        assert!(owed.accounts.lock().len() > MANY_DEBTS, "a known account needs no room");
        owed.add(LimitClass::Send, AccountId(-1), 1, later);
        assert_eq!(owed.accounts.lock().len(), 2);
        assert_eq!(owed.collect(LimitClass::Send, AccountId(0)), 2);
    }

    #[test]
    fn no_two_subjects_share_a_budget() {
        let ip = |text: &str| Subject::Ip(text.parse().expect("an address")).to_bytes();
        let name = Username::parse("1").expect("a name");
        let (one, two) = (IdentityKey::new([1; 32]), IdentityKey::new([2; 32]));
        let subjects = [
            ip("0.0.0.1"),
            ip("0.0.0.2"),
            ip("::"),
            ip("2001:db8::1"),
            ip("2001:db8:0:1::1"),
            Subject::Account(AccountId(1)).to_bytes(),
            Subject::Account(AccountId(2)).to_bytes(),
            Subject::Username(&name).to_bytes(),
            Subject::UsernameAndIp(&name, IpAddr::from([0, 0, 0, 1])).to_bytes(),
            Subject::UsernameAndIp(&name, IpAddr::from([0, 0, 0, 2])).to_bytes(),
            Subject::Target(AccountId(1), &one).to_bytes(),
            Subject::Target(AccountId(1), &two).to_bytes(),
            Subject::Target(AccountId(2), &one).to_bytes(),
        ];
        assert_eq!(HashSet::from(subjects).len(), subjects.len());
        assert_eq!(ip("2001:db8::1"), ip("2001:db8::2"));
    }
}
