//! Faults between two programs: a proxy on loopback that delays, throttles, holds, loses, doubles
//! and cuts.
//!
//! [`TcpProxy`] and [`UdpProxy`] listen on a port of their own and pass everything to one target.
//! What they do to it is switched while they run, through a [`Switch`] that any task may hold.
//! Every decision comes from the random numbers given in: the n-th datagram of the k-th flow meets
//! the same fate in every run with the same seed and faults, whatever the timing. A link that is
//! faultless passes all of it as it came.

mod lane;
mod tcp;
mod udp;

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{AbortHandle, JoinHandle},
};

pub use tcp::TcpProxy;
pub use udp::UdpProxy;

/// What a link does to what it carries, the same in both directions. The default does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Faults {
    pub link: Link,
    /// Added to everything.
    pub latency: Duration,
    /// A random part of this is added, too; it never changes the order.
    pub jitter: Duration,
    /// In bytes per second, for each connection or flow and each direction.
    pub throttle: Option<NonZeroU64>,
    /// UDP: the probability, 0 to 1, that a datagram is lost.
    pub loss: f64,
    /// UDP: the probability that a datagram arrives twice.
    pub duplication: f64,
    /// UDP: the probability that a datagram is held back by [`Faults::held_back`], so that later
    /// ones pass it.
    pub reordering: f64,
    pub held_back: Duration,
}

/// Whether anything passes at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Link {
    #[default]
    Up,
    /// A partition: nothing passes this way and nobody is told. Datagrams are lost; a TCP
    /// connection stays open and what it carries waits, as the kernel would repeat it, until the
    /// link is up again.
    Blackhole(Way),
    /// TCP: every connection is reset, those that are open and each that is made. UDP: every flow
    /// is forgotten, nothing passes.
    Reset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToTarget,
    ToClient,
    Both,
}

impl Faults {
    fn blocks(&self, way: Way) -> bool {
        match self.link {
            Link::Up => false,
            Link::Blackhole(Way::Both) | Link::Reset => true,
            Link::Blackhole(blocked) => blocked == way,
        }
    }
}

/// What a proxy has done so far: TCP counts connections, UDP counts flows and datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Connections or flows begun.
    pub begun: u64,
    /// Connections reset or flows forgotten, by order or because the target did not take them.
    pub cut: u64,
    /// Datagrams that went on, copies included.
    pub passed: u64,
    /// Datagrams that did not: lost by chance, held by a partition, or too many at once for the
    /// throttle.
    pub lost: u64,
    pub doubled: u64,
    pub held_back: u64,
}

/// Switches the faults of one proxy; its clones switch the same.
#[derive(Debug, Clone)]
pub struct Switch(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    faults: watch::Sender<Faults>,
    /// How often everything was cut.
    cuts: watch::Sender<u64>,
    begun: AtomicU64,
    cut: AtomicU64,
    passed: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    held_back: AtomicU64,
}

impl Switch {
    fn new() -> Self {
        Self(Arc::default())
    }

    /// From now on these. What is under way keeps the delay that it was given.
    pub fn set(&self, faults: Faults) {
        self.0.faults.send_replace(faults);
    }

    /// Changes some of the faults.
    pub fn change(&self, change: impl FnOnce(&mut Faults)) {
        self.0.faults.send_modify(change);
    }

    pub fn faults(&self) -> Faults {
        *self.0.faults.borrow()
    }

    /// No faults at all.
    pub fn heal(&self) {
        self.set(Faults::default());
    }

    /// TCP: resets every connection that the proxy has accepted. UDP: forgets every flow, so that
    /// the target sees clients come from new ports, as after a NAT that lost its table. New ones
    /// are carried as before.
    pub fn cut_all(&self) {
        self.0.cuts.send_modify(|cuts| *cuts += 1);
    }

    pub fn tally(&self) -> Tally {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let shared = &self.0;
        Tally {
            begun: read(&shared.begun),
            cut: read(&shared.cut),
            passed: read(&shared.passed),
            lost: read(&shared.lost),
            doubled: read(&shared.doubled),
            held_back: read(&shared.held_back),
        }
    }

    fn count(&self, counter: impl Fn(&Shared) -> &AtomicU64) {
        counter(&self.0).fetch_add(1, Ordering::Relaxed);
    }

    fn watch_faults(&self) -> watch::Receiver<Faults> {
        self.0.faults.subscribe()
    }

    fn watch_cuts(&self) -> watch::Receiver<u64> {
        self.0.cuts.subscribe()
    }
}

/// The task of a proxy, ended when the proxy is dropped, and with it all its connections.
#[derive(Debug)]
struct Guard(AbortHandle);

impl Guard {
    fn of(task: &JoinHandle<()>) -> Self {
        Self(task.abort_handle())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}
