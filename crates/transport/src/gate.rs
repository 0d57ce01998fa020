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
    /// Handshakes of validated addresses, by network.
    handshakes_by_ip: Mutex<HashMap<IpAddr, usize>>,
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
    HandshakesPerIp,
}

impl Refused {
    pub(crate) const ALL: [Self; 5] = [
        Self::Draining,
        Self::Connections,
        Self::ConnectionsPerIp,
        Self::Handshakes,
        Self::HandshakesPerIp,
    ];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Connections => "connections",
            Self::ConnectionsPerIp => "connections_per_ip",
            Self::Handshakes => "handshakes",
            Self::HandshakesPerIp => "handshakes_per_ip",
        }
    }

    /// The setting that refused, and its value; `None` where the server stops.
    pub(crate) fn setting(self, limits: &Limits) -> Option<(&'static str, usize)> {
        Some(match self {
            Self::Draining => return None,
            Self::Connections => ("transport.max_connections", limits.max_connections),
            Self::ConnectionsPerIp => {
                ("transport.max_connections_per_ip", limits.max_connections_per_ip)
            }
            Self::Handshakes => ("transport.max_handshakes", limits.max_handshakes),
            Self::HandshakesPerIp => {
                ("transport.max_handshakes_per_ip", limits.max_handshakes_per_ip)
            }
        })
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
    /// The network that it is counted for. Only validated addresses are: a spoofed address must
    /// not use up the share of its owner. The others are few, since from `retry_above` on every
    /// address is validated first.
    counted_for: Option<IpAddr>,
}

impl Gate {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            draining: AtomicBool::new(false),
            handshakes: AtomicUsize::new(0),
            handshakes_by_ip: Mutex::default(),
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
        // An IPv6 client has a whole /64 of addresses at its will.
        let ip = network(ip);
        let handshaking = match self.begin_handshake(ip, address) {
            Ok(handshaking) => handshaking,
            Err(reason) => return Verdict::Refuse(reason),
        };
        match self.enter(ip) {
            Ok(place) => Verdict::Accept(place, handshaking),
            Err(reason) => Verdict::Refuse(reason),
        }
    }

    /// Whether so many handshakes are in progress that each gets less time.
    pub(crate) fn is_under_pressure(&self) -> bool {
        self.under_pressure.load(Ordering::Relaxed)
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The connections that are counted now.
    pub(crate) fn connections(&self) -> usize {
        self.inside.lock().connections
    }

    fn begin_handshake(
        self: &Arc<Self>,
        ip: IpAddr,
        address: Address,
    ) -> Result<Handshaking, Refused> {
        let counted_for = match address {
            Address::Claimed => None,
            Address::Validated => {
                let mut by_ip = self.handshakes_by_ip.lock();
                let count = by_ip.get(&ip).copied().unwrap_or_default();
                if count >= self.limits.max_handshakes_per_ip {
                    return Err(Refused::HandshakesPerIp);
                }
                by_ip.insert(ip, count + 1);
                Some(ip)
            }
        };
        self.handshakes.fetch_add(1, Ordering::Relaxed);
        Ok(Handshaking { gate: Arc::clone(self), counted_for })
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
        count_out(&mut inside.by_ip, self.ip);
    }
}

fn count_out(by_ip: &mut HashMap<IpAddr, usize>, ip: IpAddr) {
    if let Entry::Occupied(mut count) = by_ip.entry(ip) {
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

impl Drop for Handshaking {
    fn drop(&mut self) {
        let handshakes = self.gate.handshakes.fetch_sub(1, Ordering::Relaxed) - 1;
        // Also looked at here: where no attempt comes, nobody else would end the pressure.
        self.gate.feel_pressure(handshakes);
        if let Some(ip) = self.counted_for {
            count_out(&mut self.gate.handshakes_by_ip.lock(), ip);
        }
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

    /// Half-open handshakes of two addresses, at a tenth of the default caps.
    #[test]
    fn half_open_handshakes_of_two_addresses_leave_room_for_a_third() {
        let limits = Limits {
            max_handshakes: 204,
            max_handshakes_per_ip: 25,
            retry_above: 25,
            ..Limits::default()
        };
        let gate = Gate::new(limits);
        let mut half_open = Vec::new();
        for attempt in 0..2_000 {
            let greedy: IpAddr = format!("10.0.0.{}", attempt % 2).parse().unwrap();
            match gate.judge(greedy, Address::Claimed) {
                Verdict::Accept(place, handshaking) => half_open.push((place, handshaking)),
                Verdict::Retry => {
                    if let Verdict::Accept(place, handshaking) =
                        gate.judge(greedy, Address::Validated)
                    {
                        half_open.push((place, handshaking));
                    }
                }
                Verdict::Refuse(_) => {}
            }
        }
        assert_eq!(half_open.len(), 25 + 2 * 25, "the claimed ones and two shares");
        assert!(gate.is_under_pressure());
        let third = "2001:db8::1".parse().unwrap();
        for _ in 0..25 {
            match gate.judge(third, Address::Validated) {
                Verdict::Accept(place, handshaking) => half_open.push((place, handshaking)),
                other => panic!("{other:?}"),
            }
        }
        let neighbour = "2001:db8::2".parse().unwrap();
        assert_eq!(refused(&gate, neighbour), Refused::HandshakesPerIp);
        half_open.clear();
        assert!(!gate.is_under_pressure());
        assert!(gate.handshakes_by_ip.lock().is_empty());
    }

    #[test]
    fn a_spoofed_address_does_not_use_up_the_share_of_its_owner() {
        let limits = Limits { max_handshakes_per_ip: 1, retry_above: 9, ..Limits::default() };
        let gate = Gate::new(limits);
        let _spoofed: Vec<_> = (0..8).map(|_| accept(&gate, IP)).collect();
        let owner = gate.judge(IP, Address::Validated);
        assert!(matches!(owner, Verdict::Accept(..)), "{owner:?}");
        assert_eq!(refused(&gate, IP), Refused::HandshakesPerIp);
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
