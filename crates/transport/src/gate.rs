//! Who is let in: the decision on each connection attempt, and the counts that it rests on.
//!
//! The decision is cheap, takes no allocation but for a new address, and never waits, because the
//! accept loop asks it about every attempt of a flood. A place in the house is held by a [`Place`]
//! and given back by its drop.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use crate::Limits;

/// Counts what is inside.
pub(crate) struct Gate {
    limits: Limits,
    draining: AtomicBool,
    handshakes: AtomicUsize,
    /// Whether addresses are being asked for; on at `retry_above` handshakes, off at half of it.
    under_pressure: AtomicBool,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    connections: usize,
    by_ip: HashMap<IpAddr, usize>,
}

/// What is to be done with a connection attempt.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Let it in; both are held by its task, the handshake until that is over.
    Accept(Place, Handshaking),
    /// Have it prove its address first.
    Retry,
    /// Say no.
    Refuse(Refused),
}

/// Why an attempt is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Draining,
    Connections,
    ConnectionsPerIp,
    Handshakes,
}

impl Refused {
    pub(crate) const ALL: [Self; 4] =
        [Self::Draining, Self::Connections, Self::ConnectionsPerIp, Self::Handshakes];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Connections => "connections",
            Self::ConnectionsPerIp => "connections_per_ip",
            Self::Handshakes => "handshakes",
        }
    }
}

/// Whether the peer has shown that it receives at its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Address {
    Validated,
    Claimed,
}

/// A connection's place among the counted ones.
pub(crate) struct Place {
    gate: Arc<Gate>,
    ip: IpAddr,
}

/// A handshake's place.
pub(crate) struct Handshaking {
    gate: Arc<Gate>,
}

impl Gate {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            draining: AtomicBool::new(false),
            handshakes: AtomicUsize::new(0),
            under_pressure: AtomicBool::new(false),
            inside: Mutex::default(),
        })
    }

    /// From now on everybody is refused.
    pub(crate) fn shut(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn judge(self: &Arc<Self>, ip: IpAddr, address: Address) -> Verdict {
        if self.draining.load(Ordering::Relaxed) {
            return Verdict::Refuse(Refused::Draining);
        }
        let handshakes = self.handshakes.load(Ordering::Relaxed);
        if self.feel_pressure(handshakes) && address == Address::Claimed {
            return Verdict::Retry;
        }
        if handshakes >= self.limits.max_handshakes {
            return Verdict::Refuse(Refused::Handshakes);
        }
        match self.enter(ip) {
            Ok(place) => {
                self.handshakes.fetch_add(1, Ordering::Relaxed);
                Verdict::Accept(place, Handshaking { gate: Arc::clone(self) })
            }
            Err(reason) => Verdict::Refuse(reason),
        }
    }

    fn feel_pressure(&self, handshakes: usize) -> bool {
        let high = self.limits.retry_above;
        let before = self.under_pressure.load(Ordering::Relaxed);
        let now = if before { handshakes > high / 2 || high == 0 } else { handshakes >= high };
        if now != before {
            self.under_pressure.store(now, Ordering::Relaxed);
            tracing::info!(handshakes, retry = now, "address validation changed");
        }
        now
    }

    fn enter(self: &Arc<Self>, ip: IpAddr) -> Result<Place, Refused> {
        // An IPv6 client has a whole /64 of addresses at its will.
        let ip = network(ip);
        let mut inside = self.inside.lock();
        if inside.connections >= self.limits.max_connections {
            return Err(Refused::Connections);
        }
        let count = inside.by_ip.get(&ip).copied().unwrap_or_default();
        if count >= self.limits.max_connections_per_ip {
            return Err(Refused::ConnectionsPerIp);
        }
        inside.by_ip.insert(ip, count + 1);
        inside.connections += 1;
        Ok(Place { gate: Arc::clone(self), ip })
    }
}

/// What counts as one address.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & (u128::MAX << 64)).into()),
        ip => ip,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.gate.inside.lock();
        inside.connections -= 1;
        if let Entry::Occupied(mut count) = inside.by_ip.entry(self.ip) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

impl Drop for Handshaking {
    fn drop(&mut self) {
        self.gate.handshakes.fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Place")
    }
}

impl std::fmt::Debug for Handshaking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handshaking")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn accept(gate: &Arc<Gate>, ip: IpAddr) -> (Place, Handshaking) {
        match gate.judge(ip, Address::Claimed) {
            Verdict::Accept(place, handshaking) => (place, handshaking),
            other => panic!("{other:?}"),
        }
    }

    fn refused(gate: &Arc<Gate>, ip: IpAddr) -> Refused {
        match gate.judge(ip, Address::Validated) {
            Verdict::Refuse(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn caps_hold_and_places_come_back() {
        let gate = Gate::new(Limits {
            max_connections: 2,
            max_connections_per_ip: 1,
            ..Limits::default()
        });
        let first = accept(&gate, IP);
        assert_eq!(refused(&gate, IP), Refused::ConnectionsPerIp);
        let second = accept(&gate, "10.0.0.1".parse().unwrap());
        assert_eq!(refused(&gate, "10.0.0.2".parse().unwrap()), Refused::Connections);
        drop(first);
        let _first = accept(&gate, IP);
        drop(second);
        gate.shut();
        assert_eq!(refused(&gate, "10.0.0.1".parse().unwrap()), Refused::Draining);
        assert_eq!(gate.inside.lock().by_ip.len(), 1);
    }

    #[test]
    fn one_ipv6_network_is_one_address() {
        let gate = Gate::new(Limits { max_connections_per_ip: 1, ..Limits::default() });
        let _first = accept(&gate, "2001:db8::1".parse().unwrap());
        assert_eq!(refused(&gate, "2001:db8::2".parse().unwrap()), Refused::ConnectionsPerIp);
        let _other = accept(&gate, "2001:db8:0:1::1".parse().unwrap());
        let _mapped = accept(&gate, "::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(refused(&gate, "10.0.0.1".parse().unwrap()), Refused::ConnectionsPerIp);
    }

    #[test]
    fn addresses_are_asked_for_from_the_high_mark_down_to_half_of_it() {
        let gate = Gate::new(Limits { retry_above: 4, max_handshakes: 6, ..Limits::default() });
        let mut inside: Vec<_> = (0..4).map(|_| accept(&gate, IP)).collect();
        assert!(matches!(gate.judge(IP, Address::Claimed), Verdict::Retry));
        for _ in 0..2 {
            let Verdict::Accept(place, handshaking) = gate.judge(IP, Address::Validated) else {
                panic!()
            };
            inside.push((place, handshaking));
        }
        assert_eq!(refused(&gate, IP), Refused::Handshakes);
        inside.truncate(3);
        assert!(matches!(gate.judge(IP, Address::Claimed), Verdict::Retry));
        inside.truncate(2);
        inside.push(accept(&gate, IP));
    }
}
