//! Rate-limit classes: which methods share a budget, what the budget is kept per, and how large it
//! is unless the configuration says otherwise. A row of the method table names its class; this file
//! is the one table of defaults, read by the configuration, the server and `docs/rpc.md`.
//!
//! A budget is a token bucket: `burst` tokens when full, `refill` more in every `every`, one for
//! each call. The defaults are far above what a person's clients do and only stop floods;
//! everything dear (a password guess, a registration, somebody's KeyPackages) is bounded tighter.

use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// What a budget is kept per. A call that has no such thing (no account before the login) is not
/// counted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitSubject {
    /// The caller's IP address (IPv6: its /64).
    Ip,
    /// The user name in the request. For logins, only addresses that have not logged in by it.
    Username,
    /// The user name in the request together with the caller's IP address.
    UsernameAndIp,
    /// The session's account.
    Account,
    /// The session's account together with the identity key it asks for.
    FetcherAndTarget,
    /// The other server's domain.
    Peer,
}

impl LimitSubject {
    /// The name in tables and in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Username => "username",
            Self::UsernameAndIp => "username_and_ip",
            Self::Account => "account",
            Self::FetcherAndTarget => "fetcher_and_target",
            Self::Peer => "peer",
        }
    }
}

/// One budget of a class, as it is when the configuration says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitDefault {
    /// What it is kept per.
    pub subject: LimitSubject,
    /// Calls that may come at once after a pause.
    pub burst: u32,
    /// Calls that are given back evenly in the course of `every`.
    pub refill: u32,
    /// The time of one `refill`.
    pub every: Duration,
}

impl LimitDefault {
    /// The refill as calls per second.
    pub fn per_second(&self) -> f64 {
        f64::from(self.refill) / self.every.as_secs_f64()
    }
}

/// Methods that share a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LimitClass {
    Health,
    Session,
    Register,
    Login,
    Logout,
    Send,
    Receive,
    KeyUpload,
    KeyFetch,
    Lookup,
    Channel,
    Log,
    Blob,
    Device,
    Recovery,
    Endpoint,
    Federation,
    Report,
    Admin,
    Account,
}

/// A class with all that is known of it.
struct Row {
    name: &'static str,
    doc: &'static str,
    defaults: &'static [LimitDefault],
}

impl LimitClass {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 20] = [
        Self::Health,
        Self::Session,
        Self::Register,
        Self::Login,
        Self::Logout,
        Self::Send,
        Self::Receive,
        Self::KeyUpload,
        Self::KeyFetch,
        Self::Lookup,
        Self::Channel,
        Self::Log,
        Self::Blob,
        Self::Device,
        Self::Recovery,
        Self::Endpoint,
        Self::Federation,
        Self::Report,
        Self::Admin,
        Self::Account,
    ];

    /// The name in tables, metrics and the configuration, e.g. `key_fetch`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// What the class bounds and why, in one sentence.
    pub const fn doc(self) -> &'static str {
        self.row().doc
    }

    /// Its budgets: a call must find a token in each whose subject it has.
    pub const fn defaults(self) -> &'static [LimitDefault] {
        self.row().defaults
    }

    /// The table. Every line: subject, burst, refill, every.
    const fn row(self) -> Row {
        use LimitSubject::{Account, FetcherAndTarget, Ip, Peer, Username, UsernameAndIp};
        match self {
            Self::Health => row(
                "health",
                "Load balancers and curious clients.",
                const { &[budget(Ip, 600, 20, SECOND)] },
            ),
            Self::Session => row(
                "session",
                "Session tokens that the server does not know; each edge counts for itself.",
                const { &[budget(Ip, 300, 120, MINUTE)] },
            ),
            Self::Register => row(
                "register",
                "New accounts; a registration is two calls.",
                const { &[budget(Ip, 40, 60, HOUR)] },
            ),
            Self::Login => row(
                "login",
                "Password guesses, by one address and against one name; a login is two calls.",
                const {
                    &[
                        budget(Ip, 120, 120, MINUTE),
                        budget(UsernameAndIp, 20, 20, MINUTE),
                        budget(Username, 60, 60, MINUTE),
                    ]
                },
            ),
            Self::Logout => {
                row("logout", "Ending sessions.", const { &[budget(Account, 60, 60, MINUTE)] })
            }
            Self::Send => row(
                "send",
                "Messages into inboxes.",
                const { &[budget(Account, 2_000, 6_000, MINUTE)] },
            ),
            Self::Receive => row(
                "receive",
                "Reading and clearing the caller's inbox.",
                const { &[budget(Account, 2_000, 6_000, MINUTE)] },
            ),
            Self::KeyUpload => row(
                "key_upload",
                "KeyPackages to check and store; one call can bring many.",
                const { &[budget(Account, 200, 120, MINUTE)] },
            ),
            Self::KeyFetch => row(
                "key_fetch",
                "KeyPackages taken away: draining somebody's is an attack.",
                const {
                    &[budget(FetcherAndTarget, 20, 20, HOUR), budget(Account, 2_000, 1_000, MINUTE)]
                },
            ),
            Self::Lookup => row(
                "lookup",
                "Names and keys that reading does not use up.",
                const { &[budget(Account, 600, 600, MINUTE)] },
            ),
            Self::Channel => row(
                "channel",
                "Channels, their members and settings.",
                const { &[budget(Account, 300, 300, MINUTE)] },
            ),
            Self::Log => row(
                "log",
                "Proofs from the key log, which need no session.",
                const { &[budget(Ip, 600, 600, MINUTE)] },
            ),
            Self::Blob => row(
                "blob",
                "Chunks of up to 1 MiB, both ways.",
                const { &[budget(Account, 600, 1_200, MINUTE)] },
            ),
            Self::Device => row(
                "device",
                "Devices and push tokens.",
                const { &[budget(Account, 60, 60, MINUTE)] },
            ),
            Self::Recovery => {
                row("recovery", "The recovery bundle.", const { &[budget(Account, 30, 60, HOUR)] })
            }
            Self::Endpoint => row(
                "endpoint",
                "Publishing and finding direct endpoints.",
                const { &[budget(Account, 300, 300, MINUTE)] },
            ),
            Self::Federation => row(
                "federation",
                "Relays and questions, from a client to another server and from another server to this one.",
                const { &[budget(Account, 2_000, 6_000, MINUTE), budget(Peer, 20_000, 60_000, MINUTE)] },
            ),
            Self::Report => row(
                "report",
                "Reports to the administrators.",
                const { &[budget(Account, 20, 60, HOUR)] },
            ),
            Self::Admin => row(
                "admin",
                "Moderation by administrators.",
                const { &[budget(Account, 600, 600, MINUTE)] },
            ),
            Self::Account => {
                row("account", "The end of an account.", const { &[budget(Account, 10, 10, HOUR)] })
            }
        }
    }
}

const fn row(name: &'static str, doc: &'static str, defaults: &'static [LimitDefault]) -> Row {
    Row { name, doc, defaults }
}

const fn budget(subject: LimitSubject, burst: u32, refill: u32, every: Duration) -> LimitDefault {
    LimitDefault { subject, burst, refill, every }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_class_has_its_own_name_and_a_budget_that_lets_calls_through() {
        let names: HashSet<_> = LimitClass::ALL.iter().map(|class| class.name()).collect();
        assert_eq!(names.len(), LimitClass::ALL.len());
        for class in LimitClass::ALL {
            assert!(!class.defaults().is_empty(), "{class:?} has no budget");
            for budget in class.defaults() {
                assert!(
                    budget.burst > 0 && budget.refill > 0 && budget.every > Duration::ZERO,
                    "{class:?}"
                );
            }
            let subjects: HashSet<_> =
                class.defaults().iter().map(|budget| budget.subject).collect();
            assert_eq!(
                subjects.len(),
                class.defaults().len(),
                "{class:?} has two budgets for one subject"
            );
        }
    }

    #[test]
    fn a_refill_is_the_same_in_any_unit() {
        assert_eq!(budget(LimitSubject::Ip, 1, 1_800, HOUR).per_second(), 0.5);
        assert_eq!(budget(LimitSubject::Ip, 1, 30, MINUTE).per_second(), 0.5);
    }
}
