//! What all handlers share: the stores, the server's secrets, the configuration, and whether it is
//! about to stop.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use qpq_domain::{Delivery, KeyPackageCaps, UnixMillis, Username, UsernameScripts};
use qpq_mls::key_package;
use qpq_ports::{Clock, Stores};
use qpq_proto::{LimitClass, LimitSubject};
use tokio::sync::watch;

use crate::{
    AnswerMemory, DeliverySigner, OpaqueServer, RateLimits, SessionLifetimes,
    account_events::AccountEvents,
    answers::Answers,
    gate::Gate,
    limits::{Limits, Owed},
    tokens::Tokens,
    waiters::Waiters,
};

/// What the composition hands over.
pub struct Parts {
    pub stores: Stores,
    pub clock: Arc<dyn Clock>,
    pub opaque: OpaqueServer,
    pub signer: DeliverySigner,
    pub config: Config,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What an operator may choose.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server's own domain: what follows the `@` of its users. Lower case; may be empty.
    pub domain: String,
    /// What Health answers as the server's version.
    pub version: String,
    pub sessions: SessionLifetimes,
    pub identity_proof: IdentityProof,
    /// The scripts that may be mixed in a new username.
    pub username_scripts: UsernameScripts,
    /// Who may call administrators' methods.
    pub admins: HashSet<Username>,
    pub limits: RateLimits,
    pub delivery: Delivery,
    pub key_packages: KeyPackageCaps,
    /// The MLS ciphersuites (RFC 9420 §17.1) whose KeyPackages are taken; those that the server
    /// cannot check, unchecked.
    pub key_package_suites: Vec<u16>,
    /// How many logins and registrations may wait for their curve arithmetic before the next is
    /// told to come later.
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
            username_scripts: UsernameScripts::default(),
            admins: HashSet::new(),
            limits: RateLimits::default(),
            delivery: Delivery::default(),
            key_packages: KeyPackageCaps::default(),
            key_package_suites: key_package::Policy::default().suites,
            waiting_logins: 256,
            answers: AnswerMemory::default(),
        }
    }
}

/// Whether a registration must show that it has the identity key's private half. What is shown is
/// always checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IdentityProof {
    #[default]
    Optional,
    Required,
}

/// The server, as its handlers see it.
pub struct App {
    pub stores: Stores,
    pub clock: Arc<dyn Clock>,
    pub opaque: OpaqueServer,
    pub signer: DeliverySigner,
    pub config: Config,
    pub(crate) limits: Limits,
    /// The memory for answers.
    pub(crate) answers: Answers,
    /// Session tokens that failed lately.
    pub(crate) tokens: Tokens,
    pub(crate) owed: Owed,
    pub(crate) waiters: Waiters,
    /// Bounds the curve arithmetic of logins.
    pub(crate) gate: Gate,
    /// Bounds the checks of uploaded KeyPackages.
    pub(crate) key_package_gate: Gate,
    /// What ends or changes for an account while its calls wait.
    pub account_events: Arc<AccountEvents>,
    pub(crate) key_package_policy: key_package::Policy,
    started_at: UnixMillis,
    draining: watch::Sender<bool>,
    store_fails: AtomicBool,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App").field("config", &self.config).finish_non_exhaustive()
    }
}

impl App {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { stores, clock, opaque, signer, config } = parts;
        let limits = Limits::new(&config.limits);
        Self {
            started_at: clock.now(),
            answers: Answers::new(config.answers),
            tokens: Tokens::new(limits.bucket(LimitClass::Session, LimitSubject::Ip)),
            limits,
            owed: Owed::default(),
            waiters: Waiters::default(),
            gate: Gate::new(config.waiting_logins),
            key_package_gate: Gate::new(config.waiting_logins),
            account_events: Arc::new(AccountEvents::new(Arc::clone(&stores.account_events))),
            key_package_policy: key_package::Policy {
                suites: config.key_package_suites.clone(),
                max_bytes: config.key_packages.max_bytes,
                ..key_package::Policy::default()
            },
            draining: watch::Sender::new(false),
            store_fails: AtomicBool::new(false),
            stores,
            clock,
            opaque,
            signer,
            config,
        }
    }

    /// Turns true once, when the server is about to stop: whoever waits should answer, and drop
    /// this when it has.
    pub fn draining(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    pub(crate) fn drain(&self) {
        self.draining.send_replace(true);
    }

    pub(crate) async fn nobody_watches_drain(&self) {
        self.draining.closed().await;
    }

    pub(crate) fn uptime(&self) -> Duration {
        self.clock.now().since(self.started_at)
    }

    /// Whether the last look at the store found it failing.
    pub(crate) fn store_fails(&self) -> bool {
        self.store_fails.load(Ordering::Relaxed)
    }

    pub(crate) fn note_store(&self, fails: bool) {
        self.store_fails.store(fails, Ordering::Relaxed);
    }
}

/// Completes when the drain that `draining` watches for has begun.
pub(crate) async fn drain_began(draining: &mut watch::Receiver<bool>) {
    // The sender is the application's, which outlives its calls; were it gone, the server would be
    // too.
    let _ = draining.wait_for(|drains| *drains).await;
}
