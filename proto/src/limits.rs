//! Rate-limit classes: the methods that share a budget, the subject of the budget, and its default
//! size. A row of the method table names its class. The configuration, the server and `docs/rpc.md`
//! read the defaults from here.
//!
//! A budget is a token bucket with `burst` tokens when full and `refill` new tokens in each
//! `every`. A call consumes one token. A call that does the work of many calls consumes as many
//! tokens; the description of its class contains the rule. The defaults are far above the needs of
//! a person's clients and only stop floods. Password guesses, registrations and KeyPackages of
//! another account have tighter budgets.

use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// The subject of a budget. A call without that subject, such as an account before the login, is
/// not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitSubject {
    /// The caller's IP address (IPv6: its /64).
    Ip,
    /// The username in the request. Logins count only from addresses that have not logged in with
    /// it.
    Username,
    /// The username in the request together with the caller's IP address.
    UsernameAndIp,
    /// The session's account.
    Account,
    /// The session's account together with the identity key in the request.
    FetcherAndTarget,
    /// The other server's domain.
    Peer,
}

impl LimitSubject {
    /// Returns the name in tables and in the configuration.
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

/// The default of one budget of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitDefault {
    /// The subject of the budget.
    pub subject: LimitSubject,
    /// The maximum number of tokens.
    pub burst: u32,
    /// The number of tokens that are added, evenly, in each `every`.
    pub refill: u32,
    /// The time in which `refill` tokens are added.
    pub every: Duration,
}

impl LimitDefault {
    /// Returns the refill in tokens per second.
    pub fn per_second(&self) -> f64 {
        f64::from(self.refill) / self.every.as_secs_f64()
    }
}

/// A class of methods that share a budget. [`LimitClass::doc`] describes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "`doc` describes each class, also in docs/rpc.md")]
pub enum LimitClass {
    Health,
    Session,
    Register,
    Login,
    Logout,
    Send,
    SendBytes,
    Receive,
    KeyUpload,
    KeyFetch,
    Lookup,
    Channel,
    Log,
    Blob,
    BlobBytes,
    Device,
    Recovery,
    Endpoint,
    Federation,
    Report,
    Admin,
    Account,
}

/// The name, description and budgets of a class.
struct Row {
    name: &'static str,
    doc: &'static str,
    defaults: &'static [LimitDefault],
}

impl LimitClass {
    /// All classes, in the order of the documentation.
    pub const ALL: [Self; 22] = [
        Self::Health,
        Self::Session,
        Self::Register,
        Self::Login,
        Self::Logout,
        Self::Send,
        Self::SendBytes,
        Self::Receive,
        Self::KeyUpload,
        Self::KeyFetch,
        Self::Lookup,
        Self::Channel,
        Self::Log,
        Self::Blob,
        Self::BlobBytes,
        Self::Device,
        Self::Recovery,
        Self::Endpoint,
        Self::Federation,
        Self::Report,
        Self::Admin,
        Self::Account,
    ];

    /// Returns the name in tables, metrics and the configuration, e.g. `key_fetch`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Returns the description of the class.
    pub const fn doc(self) -> &'static str {
        self.row().doc
    }

    /// Returns the budgets of the class. A call needs a token of each budget whose subject it has.
    pub const fn defaults(self) -> &'static [LimitDefault] {
        self.row().defaults
    }

    /// The table of classes. The arguments of `budget` are subject, burst, refill, every.
    const fn row(self) -> Row {
        use LimitSubject::{Account, FetcherAndTarget, Ip, Username, UsernameAndIp};
        match self {
            Self::Health => row(
                "health",
                "Health checks of load balancers and clients.",
                const { &[budget(Ip, 600, 20, SECOND)] },
            ),
            Self::Session => row(
                "session",
                "Unknown session tokens; each edge counts separately.",
                const { &[budget(Ip, 300, 120, MINUTE)] },
            ),
            Self::Register => row(
                "register",
                "Registrations; one registration is two calls.",
                const { &[budget(Ip, 40, 60, HOUR)] },
            ),
            Self::Login => row(
                "login",
                "Password guesses, by address and by username; a login is two calls.",
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
                "Messages into inboxes; each message of a batch counts.",
                const { &[budget(Account, 2_000, 6_000, MINUTE)] },
            ),
            Self::SendBytes => row(
                "send_bytes",
                "Bytes into inboxes, of calls that send 16 KiB or more: in a fan-out the payload \
                 counts for each recipient. Smaller calls are bounded by their messages.",
                const { &[budget(Account, 128 << 20, 128 << 20, MINUTE)] },
            ),
            Self::Receive => row(
                "receive",
                "Reading from and removing from the caller's inbox. Each 100 messages and each \
                 256 KiB of an answer, and each 100 seqs that an ack names or removes, count as \
                 one more call, consumed with the next one.",
                const { &[budget(Account, 2_000, 6_000, MINUTE)] },
            ),
            Self::KeyUpload => row(
                "key_upload",
                "KeyPackages to check and store; each package of a call counts.",
                const { &[budget(Account, 2_000, 1_000, MINUTE)] },
            ),
            Self::KeyFetch => row(
                "key_fetch",
                "KeyPackages that a fetch consumes: emptying another account's stock is an attack.",
                const {
                    &[budget(FetcherAndTarget, 20, 20, HOUR), budget(Account, 2_000, 1_000, MINUTE)]
                },
            ),
            Self::Lookup => row(
                "lookup",
                "Look-ups of names and keys, which consume nothing.",
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
                "Uploads and downloads of chunks of up to 1 MiB.",
                const { &[budget(Account, 600, 1_200, MINUTE)] },
            ),
            Self::BlobBytes => row(
                "blob_bytes",
                "Bytes of uploaded chunks; a chunk counts as at least 64 KiB.",
                const { &[budget(Account, 256 << 20, 256 << 20, MINUTE)] },
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
                "Publishing and resolving direct endpoints.",
                const { &[budget(Account, 300, 300, MINUTE)] },
            ),
            Self::Federation => row(
                "federation",
                "Relayed messages and look-ups, to another server and from another server.",
                FEDERATION,
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
            Self::Account => row(
                "account",
                "Changing the password, and deleting the account.",
                const { &[budget(Account, 10, 10, HOUR)] },
            ),
        }
    }
}

const FEDERATION: &[LimitDefault] = &[
    budget(LimitSubject::Account, 2_000, 6_000, MINUTE),
    budget(LimitSubject::Peer, 20_000, 60_000, MINUTE),
];

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
    fn every_class_has_a_unique_name_and_a_budget_above_zero() {
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
    fn equal_refills_in_different_units_have_the_same_rate() {
        assert_eq!(budget(LimitSubject::Ip, 1, 1_800, HOUR).per_second(), 0.5);
        assert_eq!(budget(LimitSubject::Ip, 1, 30, MINUTE).per_second(), 0.5);
    }
}
