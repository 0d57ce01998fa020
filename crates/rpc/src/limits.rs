//! Rate limits: the budgets that calls consume, and the consequences when counting fails.
//!
//! The classes and their defaults are one table in `qpq_proto::limits`; the configuration overrides
//! budgets by class and subject. The dispatcher takes the call from the budgets of the address and
//! of the principal. A handler takes the call from the budgets of the username or the target,
//! through [`Cx::limit`](crate::Cx::limit), as soon as it has parsed them.

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

/// The configured rate limits.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimits {
    /// Whether calls are limited at all.
    pub enabled: bool,
    /// Budgets that replace those of the table, or are added to them.
    pub overrides: HashMap<(LimitClass, LimitSubject), Bucket>,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self { enabled: true, overrides: HashMap::new() }
    }
}

/// The subject of a budget.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// A client's address.
    Ip(IpAddr),
    /// A username.
    Username(&'a Username),
    /// A username, and the address of a login with it.
    UsernameAndIp(&'a Username, IpAddr),
    /// An account.
    Account(AccountId),
    /// An account, and the identity key whose KeyPackage it fetches.
    Target(AccountId, &'a IdentityKey),
    /// Another server, by its domain.
    Peer(&'a str),
}

/// A subject as a fixed number of bytes. Different subjects have different keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SubjectKey(pub(crate) [u8; 16]);

/// The budgets in force, looked up by class without hashing.
#[derive(Debug)]
pub(crate) struct Budgets {
    enabled: bool,
    budgets: Vec<Vec<(LimitSubject, Bucket)>>,
}

impl Budgets {
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

    /// Returns the part of `cost` that a full budget of `subject` can pay in addition to one call.
    pub(crate) fn payable(&self, class: LimitClass, subject: Subject<'_>, cost: u32) -> u32 {
        let bucket = self.bucket(class, subject.limit_subject());
        bucket.map_or(cost, |bucket| cost.min(bucket.burst.saturating_sub(1)))
    }

    /// Takes `cost` from the budget that `class` has for `subject`, if there is one.
    pub(crate) async fn take(
        &self,
        cx: Cx<'_>,
        class: LimitClass,
        subject: Subject<'_>,
        cost: u32,
    ) -> Result<(), Error> {
        let Some(bucket) = self.bucket(class, subject.limit_subject()) else { return Ok(()) };
        let key = LimitKey { class: class.name(), subject: subject.key().0 };
        match cx.app.stores.limiter.take(key, bucket, cost, cx.now).await {
            Ok(Verdict::Allowed) => Ok(()),
            Ok(Verdict::RetryAfter(wait)) => Err(Error::RateLimited(wait)),
            Err(error) if is_allowed_uncounted(class) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "counting a rate limit failed, the call is allowed"
                );
                Ok(())
            }
            Err(error) => Err(Error::Unavailable(error)),
        }
    }
}

/// The time for which the address of a login is remembered.
const ADDRESS_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// The class of the keys of remembered addresses.
const KNOWN_ADDRESS: &str = "login_address";

fn known_address(cx: Cx<'_>, name: &Username) -> LimitKey {
    let subject = Subject::UsernameAndIp(name, cx.conn.ip()).key().0;
    LimitKey { class: KNOWN_ADDRESS, subject }
}

/// Takes one login from the budgets of `name`.
///
/// The budget of the name alone counts only attempts from addresses that have not logged in with
/// it. So strangers who exhaust it do not lock out the account's owner. Strangers at a single
/// address exhaust first the budget of the name and that address. The outcome depends on the name
/// and the address, never on the existence of the account.
pub(crate) async fn take_login(cx: Cx<'_>, name: &Username) -> Result<(), Error> {
    cx.limit(LimitClass::Login, Subject::UsernameAndIp(name, cx.conn.ip())).await?;
    if cx.app.budgets.bucket(LimitClass::Login, LimitSubject::Username).is_none() {
        return Ok(());
    }
    // A failure refuses the login, because a limiter that fails here could not count it either.
    let is_known = cx.app.stores.limiter.remembers(known_address(cx, name), cx.now).await?;
    if is_known { Ok(()) } else { cx.limit(LimitClass::Login, Subject::Username(name)).await }
}

/// Remembers that the client's address has logged in with `name`. A failure is only logged: the
/// address then counts like that of a stranger.
pub(crate) async fn remember_login(cx: Cx<'_>, name: &Username) {
    if !cx.app.budgets.enabled {
        return;
    }
    let remembered =
        cx.app.stores.limiter.remember(known_address(cx, name), ADDRESS_LIFETIME, cx.now).await;
    if let Err(error) = remembered {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "remembering the address of a login failed"
        );
    }
}

/// The costs that subjects have not paid yet, in this process. The next call of the class pays
/// them.
///
/// The cost of a read is known only after the read, and a batch may cost more than a full budget
/// contains.
#[derive(Debug, Default)]
pub(crate) struct Debts {
    subjects: Mutex<HashMap<(LimitClass, SubjectKey), Debt>>,
}

#[derive(Debug, Default)]
struct Debt {
    cost: u32,
    since: UnixMillis,
}

/// The age after which a debt may be removed. A budget has usually refilled in that time.
const DEBT_LIFETIME: Duration = Duration::from_secs(60);

/// The number of subjects from which a map of subjects is pruned.
const PRUNE_FROM: usize = 1_024;

/// Returns whether to remove unused entries from a map of subjects, because it has many and would
/// grow with the next one.
pub(crate) fn is_pruning_due<K, V>(subjects: &HashMap<K, V>) -> bool {
    subjects.len() >= PRUNE_FROM && subjects.len() == subjects.capacity()
}

impl Debts {
    /// Returns and removes the debt of a subject.
    pub(crate) fn collect(&self, class: LimitClass, subject: SubjectKey) -> u32 {
        self.subjects.lock().remove(&(class, subject)).map_or(0, |debt| debt.cost)
    }

    /// Adds to the debt of a subject.
    pub(crate) fn add(&self, class: LimitClass, subject: SubjectKey, cost: u32, now: UnixMillis) {
        if cost == 0 {
            return;
        }
        let mut subjects = self.subjects.lock();
        let key = (class, subject);
        if is_pruning_due(&subjects) && !subjects.contains_key(&key) {
            subjects.retain(|_, debt| now.since(debt.since) < DEBT_LIFETIME);
        }
        let debt = subjects.entry(key).or_default();
        *debt = Debt { cost: debt.cost.saturating_add(cost), since: now };
    }
}

/// Returns whether calls of `class` are allowed while counting fails. Logins, registrations and
/// calls for recovery are not, all others are.
const fn is_allowed_uncounted(class: LimitClass) -> bool {
    !matches!(class, LimitClass::Login | LimitClass::Register | LimitClass::Recovery)
}

fn default_budget(budget: &LimitDefault) -> (LimitSubject, Bucket) {
    (budget.subject, Bucket { burst: budget.burst, per_second: budget.per_second() })
}

impl Subject<'_> {
    const fn limit_subject(self) -> LimitSubject {
        match self {
            Self::Ip(_) => LimitSubject::Ip,
            Self::Username(_) => LimitSubject::Username,
            Self::UsernameAndIp(..) => LimitSubject::UsernameAndIp,
            Self::Account(_) => LimitSubject::Account,
            Self::Target(..) => LimitSubject::FetcherAndTarget,
            Self::Peer(_) => LimitSubject::Peer,
        }
    }

    /// Returns the key of the subject. Personal data is hashed. Keys of different kinds differ in
    /// their first bytes.
    pub(crate) fn key(self) -> SubjectKey {
        SubjectKey(match self {
            Self::Ip(ip) => network(ip),
            Self::Account(AccountId(id)) => account(id),
            Self::Username(name) => tagged(b"username", &[name.as_str().as_bytes()]),
            Self::UsernameAndIp(name, ip) => {
                tagged(b"username and ip", &[&network(ip), name.as_str().as_bytes()])
            }
            Self::Target(AccountId(id), target) => {
                tagged(b"target", &[&id.to_be_bytes(), target.as_bytes()])
            }
            Self::Peer(domain) => tagged(b"peer", &[domain.as_bytes()]),
        })
    }
}

/// Returns the bytes of the network that counts as one address.
pub(crate) fn network(ip: IpAddr) -> [u8; 16] {
    prefix(ip).octets()
}

/// Returns an IPv4 address unchanged, and of an IPv6 address the /64: the smallest network that a
/// customer receives.
fn prefix(ip: IpAddr) -> Ipv6Addr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0)
        }
    }
}

/// Returns the id after eight bytes of 0xff. No client's address begins with them, because they are
/// the prefix of multicast addresses (RFC 4291 §2.7).
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

    const NOW: UnixMillis = UnixMillis(1_000_000);

    #[test]
    fn budgets_are_found_by_their_class() {
        let budgets = Budgets::new(&RateLimits::default());
        for class in LimitClass::ALL {
            for budget in class.defaults() {
                let (per, bucket) = default_budget(budget);
                assert_eq!(budgets.bucket(class, per), Some(bucket), "{class:?}");
            }
        }
        let off = Budgets::new(&RateLimits { enabled: false, ..RateLimits::default() });
        assert_eq!(off.bucket(LimitClass::Health, LimitSubject::Ip), None);
    }

    #[test]
    fn an_override_replaces_a_budget_or_adds_one() {
        let bucket = Bucket { burst: 1, per_second: 2.0 };
        let places =
            [(LimitClass::Health, LimitSubject::Ip), (LimitClass::Health, LimitSubject::Account)];
        let config =
            RateLimits { enabled: true, overrides: places.map(|place| (place, bucket)).into() };
        let budgets = Budgets::new(&config);
        for (class, per) in places {
            assert_eq!(budgets.bucket(class, per), Some(bucket));
        }
        assert_ne!(budgets.bucket(LimitClass::Login, LimitSubject::Ip), Some(bucket));
    }

    #[test]
    fn a_debt_is_collected_once() {
        let debts = Debts::default();
        let subject = Subject::Account(AccountId(1)).key();
        debts.add(LimitClass::Send, subject, 0, NOW);
        assert!(debts.subjects.lock().is_empty());
        debts.add(LimitClass::Send, subject, 2, NOW);
        debts.add(LimitClass::Send, subject, 3, NOW);
        assert_eq!(debts.collect(LimitClass::Receive, subject), 0);
        assert_eq!(debts.collect(LimitClass::Send, subject), 5);
        assert_eq!(debts.collect(LimitClass::Send, subject), 0);
    }

    #[test]
    fn old_debts_are_removed_when_there_are_many() {
        let debts = Debts::default();
        let later = NOW.plus(DEBT_LIFETIME);
        let account = |n| Subject::Account(AccountId(n)).key();
        for n in 0.. {
            debts.add(LimitClass::Send, account(n), 1, NOW);
            if is_pruning_due(&debts.subjects.lock()) {
                break;
            }
        }
        debts.add(LimitClass::Send, account(0), 1, later);
        assert!(debts.subjects.lock().len() > PRUNE_FROM, "a known subject needs no space");
        debts.add(LimitClass::Send, account(-1), 1, later);
        assert_eq!(debts.subjects.lock().len(), 2);
        assert_eq!(debts.collect(LimitClass::Send, account(0)), 2);
    }

    #[test]
    fn no_two_subjects_share_a_budget() {
        let ip = |text: &str| Subject::Ip(text.parse().expect("an address")).key();
        let name = Username::parse("1").expect("a name");
        let (one, two) = (IdentityKey::new([1; 32]), IdentityKey::new([2; 32]));
        let subjects = [
            ip("0.0.0.1"),
            ip("0.0.0.2"),
            ip("::"),
            ip("2001:db8::1"),
            ip("2001:db8:0:1::1"),
            Subject::Account(AccountId(1)).key(),
            Subject::Account(AccountId(2)).key(),
            Subject::Username(&name).key(),
            Subject::Peer("1").key(),
            Subject::Peer("2").key(),
            Subject::UsernameAndIp(&name, IpAddr::from([0, 0, 0, 1])).key(),
            Subject::UsernameAndIp(&name, IpAddr::from([0, 0, 0, 2])).key(),
            Subject::Target(AccountId(1), &one).key(),
            Subject::Target(AccountId(1), &two).key(),
            Subject::Target(AccountId(2), &one).key(),
        ];
        assert_eq!(HashSet::from(subjects).len(), subjects.len());
        assert_eq!(ip("2001:db8::1"), ip("2001:db8::2"));
    }
}
