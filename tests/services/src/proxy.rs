//! Network faults between two programs: proxies on loopback that delay, throttle, block, lose,
//! duplicate, reorder and reset.
//!
//! [`TcpProxy`] and [`UdpProxy`] listen on their own port and forward everything to one target. A
//! [`Switch`] changes the faults while they run. All decisions come from the given random numbers:
//! with the same seed and faults, the n-th datagram of the k-th flow has the same fate in every
//! run, independent of timing. Without faults everything is forwarded unchanged.

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

/// The faults of a link, the same in both directions. The default has no faults.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Faults {
    pub link: Link,
    /// A delay for all data.
    pub latency: Duration,
    /// The maximum of an additional random delay, which never changes the order.
    pub jitter: Duration,
    /// Bytes per second, for each connection or flow and each direction.
    pub throttle: Option<NonZeroU64>,
    /// UDP: the probability, from 0 to 1, that a datagram is lost.
    pub loss: f64,
    /// UDP: the probability that a datagram arrives twice.
    pub duplication: f64,
    /// UDP: the probability that a datagram is delayed by [`Faults::held_back`], so that later ones
    /// overtake it.
    pub reordering: f64,
    pub held_back: Duration,
}

/// The state of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Link {
    #[default]
    Up,
    /// A silent partition in one or both directions. Datagrams are lost. TCP connections stay open,
    /// and their data waits until the link is up again, as the kernel would retransmit it.
    Blackhole(Way),
    /// TCP: all open and new connections are reset. UDP: all flows are forgotten, and all datagrams
    /// are lost.
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

/// The counters of a proxy: connections for TCP, flows and datagrams for UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Connections or flows that were started.
    pub begun: u64,
    /// Connections that were reset or flows that were forgotten, by a fault or because the target
    /// refused them.
    pub cut: u64,
    /// Forwarded datagrams, including duplicates.
    pub passed: u64,
    /// Lost datagrams: by probability, by a partition, or because the throttle's queue was full.
    pub lost: u64,
    pub doubled: u64,
    pub held_back: u64,
}

/// Changes the faults of one proxy. Clones change the same proxy.
#[derive(Debug, Clone)]
pub struct Switch(Arc<State>);

#[derive(Debug, Default)]
struct State {
    faults: watch::Sender<Faults>,
    /// The number of calls of `cut_all`.
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

    /// Sets the faults. Data in transit keeps its delay.
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

    /// Removes all faults.
    pub fn heal(&self) {
        self.set(Faults::default());
    }

    /// TCP: resets all open connections. UDP: forgets all flows, so that the target sees the
    /// clients at new ports, as after a NAT that lost its table. New connections and flows work as
    /// before.
    pub fn cut_all(&self) {
        self.0.cuts.send_modify(|cuts| *cuts += 1);
    }

    pub fn tally(&self) -> Tally {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = &self.0;
        Tally {
            begun: read(&state.begun),
            cut: read(&state.cut),
            passed: read(&state.passed),
            lost: read(&state.lost),
            doubled: read(&state.doubled),
            held_back: read(&state.held_back),
        }
    }

    fn count(&self, counter: impl Fn(&State) -> &AtomicU64) {
        counter(&self.0).fetch_add(1, Ordering::Relaxed);
    }

    fn watch_faults(&self) -> watch::Receiver<Faults> {
        self.0.faults.subscribe()
    }

    fn watch_cuts(&self) -> watch::Receiver<u64> {
        self.0.cuts.subscribe()
    }
}

/// Aborts the task of a proxy, and with it all its connections, when dropped.
#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl AbortOnDrop {
    fn new(task: &JoinHandle<()>) -> Self {
        Self(task.abort_handle())
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
