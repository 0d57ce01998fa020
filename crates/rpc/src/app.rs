//! The state that all handlers share: the stores, the server's secrets, the configuration, the
//! limits, and the drain.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use qpq_domain::{
    Choice, DeliveryLimits, KeyPackageLimits, Skeleton, UnixMillis, Username, UsernameScripts,
};
use qpq_mls::key_package;
use qpq_ports::{Clock, Stores};
use qpq_proto::{LimitClass, LimitSubject};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use crate::{
    AnswerMemory, AtRestKeys, DeliverySigner, OpaqueServer, RateLimits, SessionLifetimes,
    account_events::AccountEvents,
    answers::Answers,
    compute::ComputeLimiter,
    limits::{Budgets, Debts},
    tokens::Tokens,
    waiters::Waiters,
};

/// The parts from which the embedder composes a server.
pub struct Parts {
    /// The implementations of the ports.
    pub stores: Stores,
    /// The source of the time.
    pub clock: Arc<dyn Clock>,
    /// The OPAQUE secrets.
    pub opaque: OpaqueServer,
    /// The key of delivery proofs.
    pub signer: DeliverySigner,
    /// The keys that seal stored data of accounts.
    pub at_rest: AtRestKeys,
    /// The configuration.
    pub config: Config,
    /// The drain signal of the process. [`Rpc::drain`](crate::Rpc::drain) cancels it, too.
    pub draining: CancellationToken,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server's own domain, which follows the `@` in its usernames. Lower case; may be empty.
    pub domain: String,
    /// The version in the answer to Health.
    pub version: String,
    pub sessions: SessionLifetimes,
    pub identity_proof: IdentityProof,
    /// The people who may register.
    pub registration: RegistrationMode,
    /// The scripts that may be mixed in a new username.
    pub username_scripts: UsernameScripts,
    /// The usernames of administrators. They are registered only with an invite that names them.
    pub admins: HashSet<Username>,
    pub limits: RateLimits,
    pub delivery: DeliveryLimits,
    pub key_packages: KeyPackageLimits,
    /// The MLS ciphersuites (RFC 9420 §17.1) of accepted KeyPackages. Packages of suites that the
    /// server cannot check are stored unchecked.
    pub key_package_suites: Vec<u16>,
    /// The maximum number of logins and registrations that wait for their OPAQUE computation. The
    /// next one is refused.
    pub waiting_logins: usize,
    /// The memory for answers.
    pub answers: AnswerMemory,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            domain: String::new(),
            version: env!("CARGO_PKG_VERSION").into(),
            sessions: SessionLifetimes::default(),
            identity_proof: IdentityProof::Optional,
            registration: RegistrationMode::Open,
            username_scripts: UsernameScripts::default(),
            admins: HashSet::new(),
            limits: RateLimits::default(),
            delivery: DeliveryLimits::default(),
            key_packages: KeyPackageLimits::default(),
            key_package_suites: key_package::Policy::default().suites,
            waiting_logins: 256,
            answers: AnswerMemory::default(),
        }
    }
}

/// The requirement of an identity proof for a registration. A proof in a request is always checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IdentityProof {
    #[default]
    /// A registration may omit the proof.
    Optional,
    /// A registration without the proof is refused.
    Required,
}

impl Choice for IdentityProof {
    const ALL: &'static [(&'static str, Self)] =
        &[("optional", Self::Optional), ("required", Self::Required)];
}

/// The people who may register an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RegistrationMode {
    #[default]
    /// Everyone.
    Open,
    /// Those who have an invite.
    Invite,
    /// Nobody.
    Closed,
}

impl Choice for RegistrationMode {
    const ALL: &'static [(&'static str, Self)] =
        &[("open", Self::Open), ("invite", Self::Invite), ("closed", Self::Closed)];
}

/// The state that all handlers share.
pub struct App {
    pub stores: Stores,
    pub clock: Arc<dyn Clock>,
    pub opaque: OpaqueServer,
    pub signer: DeliverySigner,
    pub at_rest: AtRestKeys,
    pub config: Config,
    pub(crate) budgets: Budgets,
    pub(crate) answers: Answers,
    pub(crate) tokens: Tokens,
    pub(crate) debts: Debts,
    pub(crate) waiters: Waiters,
    /// Limits the OPAQUE computations of registrations and logins.
    pub(crate) opaque_limiter: ComputeLimiter,
    /// Limits the checks of uploaded KeyPackages.
    pub(crate) key_package_limiter: ComputeLimiter,
    /// The tasks that calls have spawned.
    pub(crate) tasks: TaskTracker,
    /// The account events for calls in progress.
    pub account_events: Arc<AccountEvents>,
    pub(crate) key_package_policy: key_package::Policy,
    /// The skeletons of the usernames of administrators.
    reserved: HashSet<Skeleton>,
    started_at: UnixMillis,
    draining: CancellationToken,
    /// The calls and subscriptions that have not reacted to the drain yet.
    drain_observers: TaskTracker,
    store_fails: AtomicBool,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App").field("config", &self.config).finish_non_exhaustive()
    }
}

impl App {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { stores, clock, opaque, signer, at_rest, config, draining } = parts;
        let budgets = Budgets::new(&config.limits);
        Self {
            started_at: clock.now(),
            answers: Answers::new(config.answers),
            tokens: Tokens::new(budgets.bucket(LimitClass::Session, LimitSubject::Ip)),
            budgets,
            debts: Debts::default(),
            waiters: Waiters::default(),
            opaque_limiter: ComputeLimiter::new(config.waiting_logins),
            key_package_limiter: ComputeLimiter::new(config.waiting_logins),
            tasks: TaskTracker::new(),
            account_events: Arc::new(AccountEvents::new(Arc::clone(&stores.account_events))),
            key_package_policy: key_package::Policy {
                suites: config.key_package_suites.clone(),
                max_bytes: config.key_packages.max_bytes,
                ..key_package::Policy::default()
            },
            reserved: config.admins.iter().map(Username::skeleton).collect(),
            draining,
            drain_observers: TaskTracker::new(),
            store_fails: AtomicBool::new(false),
            stores,
            clock,
            opaque,
            signer,
            at_rest,
            config,
        }
    }

    /// Returns whether the username is one of an administrator, or looks like one.
    pub(crate) fn is_reserved(&self, username: &Username) -> bool {
        !self.reserved.is_empty() && self.reserved.contains(&username.skeleton())
    }

    /// Returns the drain signal for a call or a subscription. Drop the signal after the reaction:
    /// the drain waits for that.
    pub(crate) fn observe_drain(&self) -> DrainObserver {
        let draining = self.draining.clone();
        DrainObserver { draining, _reacts: self.drain_observers.token() }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    pub(crate) fn drain(&self) {
        self.draining.cancel();
    }

    /// Completes once all observers of the drain are dropped.
    pub(crate) async fn drained(&self) {
        self.drain_observers.close();
        self.drain_observers.wait().await;
    }

    pub(crate) fn uptime(&self) -> Duration {
        self.clock.now().since(self.started_at)
    }

    /// Returns whether the last check of the store failed.
    pub(crate) fn store_fails(&self) -> bool {
        self.store_fails.load(Ordering::Relaxed)
    }

    pub(crate) fn set_store_fails(&self, fails: bool) {
        self.store_fails.store(fails, Ordering::Relaxed);
    }
}

/// The drain signal of the process. The drain waits until all observers are dropped.
pub(crate) struct DrainObserver {
    draining: CancellationToken,
    _reacts: TaskTrackerToken,
}

impl DrainObserver {
    /// Completes when the drain has begun. Cancel-safe.
    pub(crate) async fn began(&self) {
        self.draining.cancelled().await;
    }
}
