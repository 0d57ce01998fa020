//! The decision on each connection attempt, and the counts of connections and handshakes that it is
//! based on.
//!
//! In a flood, the accept loop needs a decision on every attempt. So a decision is cheap, allocates
//! only for a new address, and never waits. A permit counts one connection or one handshake until
//! it is dropped.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::config::TransportLimits;

/// The admission of connections to a server.
pub(crate) struct Admission {
    limits: TransportLimits,
    /// Once cancelled, every attempt is refused.
    draining: CancellationToken,
    handshakes: AtomicUsize,
    /// Handshakes of validated addresses, by network.
    handshakes_by_ip: Mutex<HashMap<IpAddr, usize>>,
    /// Whether clients must prove their addresses: on at `retry_above` handshakes, off at half of
    /// that.
    is_under_pressure: AtomicBool,
    connections: Mutex<Connections>,
}

/// The counts of connections.
#[derive(Default)]
struct Connections {
    total: usize,
    by_ip: HashMap<IpAddr, usize>,
}

/// The decision on a connection attempt.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Accept. The connection's task keeps both permits, the second one until the handshake is
    /// over.
    Accept(ConnectionPermit, HandshakePermit),
    /// Ask the client to prove its address first.
    Retry,
    /// Refuse.
    Refuse(LimitReached),
}

/// The reason why an attempt is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LimitReached {
    Draining,
    Connections,
    ConnectionsPerIp,
    Handshakes,
    HandshakesPerIp,
}

impl LimitReached {
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

    /// Returns the name and the value of the setting to raise. `None` while the server drains.
    pub(crate) fn setting(self, limits: &TransportLimits) -> Option<(&'static str, usize)> {
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

/// Whether the client has proved that it receives datagrams at its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Address {
    Validated,
    Claimed,
}

/// Counts one connection until it is dropped.
pub(crate) struct ConnectionPermit {
    admission: Arc<Admission>,
    ip: IpAddr,
}

/// Counts one handshake until it is dropped.
pub(crate) struct HandshakePermit {
    admission: Arc<Admission>,
    /// The network to whose limit the handshake counts. `None` if the address is not validated,
    /// because a spoofed address must not use up the limit of its owner. There are at most
    /// `retry_above` such handshakes: above that, every address is validated first.
    counted_for: Option<IpAddr>,
}

impl Admission {
    pub(crate) fn new(limits: TransportLimits, draining: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            limits,
            draining,
            handshakes: AtomicUsize::new(0),
            handshakes_by_ip: Mutex::default(),
            is_under_pressure: AtomicBool::new(false),
            connections: Mutex::default(),
        })
    }

    /// Decides on a connection attempt from `ip`.
    pub(crate) fn decide(self: &Arc<Self>, ip: IpAddr, address: Address) -> Decision {
        if self.draining.is_cancelled() {
            return Decision::Refuse(LimitReached::Draining);
        }
        let handshakes = self.handshakes.load(Ordering::Relaxed);
        if self.update_pressure(handshakes) && address == Address::Claimed {
            return Decision::Retry;
        }
        if handshakes >= self.limits.max_handshakes {
            return Decision::Refuse(LimitReached::Handshakes);
        }
        // An IPv6 client can use all addresses of its /64 network.
        let ip = network(ip);
        let handshake = match self.count_handshake(ip, address) {
            Ok(permit) => permit,
            Err(reason) => return Decision::Refuse(reason),
        };
        match self.count_connection(ip) {
            Ok(connection) => Decision::Accept(connection, handshake),
            Err(reason) => Decision::Refuse(reason),
        }
    }

    /// Returns whether the number of handshakes is so high that each has less time.
    pub(crate) fn is_under_pressure(&self) -> bool {
        self.is_under_pressure.load(Ordering::Relaxed)
    }

    pub(crate) fn limits(&self) -> &TransportLimits {
        &self.limits
    }

    /// Returns the current number of connections.
    pub(crate) fn connections(&self) -> usize {
        self.connections.lock().total
    }

    fn count_handshake(
        self: &Arc<Self>,
        ip: IpAddr,
        address: Address,
    ) -> Result<HandshakePermit, LimitReached> {
        let counted_for = match address {
            Address::Claimed => None,
            Address::Validated => {
                let mut by_ip = self.handshakes_by_ip.lock();
                let count = by_ip.get(&ip).copied().unwrap_or_default();
                if count >= self.limits.max_handshakes_per_ip {
                    return Err(LimitReached::HandshakesPerIp);
                }
                by_ip.insert(ip, count + 1);
                Some(ip)
            }
        };
        self.handshakes.fetch_add(1, Ordering::Relaxed);
        Ok(HandshakePermit { admission: Arc::clone(self), counted_for })
    }

    /// Updates the pressure for this number of handshakes and returns it.
    fn update_pressure(&self, handshakes: usize) -> bool {
        let high = self.limits.retry_above;
        let before = self.is_under_pressure.load(Ordering::Relaxed);
        let now = if before { handshakes > high / 2 || high == 0 } else { handshakes >= high };
        if now != before {
            self.is_under_pressure.store(now, Ordering::Relaxed);
            tracing::info!(handshakes, retry = now, "address validation changed");
        }
        now
    }

    fn count_connection(self: &Arc<Self>, ip: IpAddr) -> Result<ConnectionPermit, LimitReached> {
        let mut connections = self.connections.lock();
        if connections.total >= self.limits.max_connections {
            return Err(LimitReached::Connections);
        }
        let count = connections.by_ip.get(&ip).copied().unwrap_or_default();
        if count >= self.limits.max_connections_per_ip {
            return Err(LimitReached::ConnectionsPerIp);
        }
        connections.by_ip.insert(ip, count + 1);
        connections.total += 1;
        Ok(ConnectionPermit { admission: Arc::clone(self), ip })
    }
}

/// Returns the address that `ip` is counted as: itself, or the /64 network of an IPv6 address.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & (u128::MAX << 64)).into()),
        ip => ip,
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut connections = self.admission.connections.lock();
        connections.total -= 1;
        subtract(&mut connections.by_ip, self.ip, 1);
    }
}

/// Subtracts `amount` from the count of `ip`, and removes a count of zero.
pub(crate) fn subtract(by_ip: &mut HashMap<IpAddr, usize>, ip: IpAddr, amount: usize) {
    if let Entry::Occupied(mut count) = by_ip.entry(ip) {
        *count.get_mut() -= amount;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        let handshakes = self.admission.handshakes.fetch_sub(1, Ordering::Relaxed) - 1;
        // Also updated here: without further attempts the pressure would never end.
        self.admission.update_pressure(handshakes);
        if let Some(ip) = self.counted_for {
            subtract(&mut self.admission.handshakes_by_ip.lock(), ip, 1);
        }
    }
}

impl fmt::Debug for ConnectionPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectionPermit")
    }
}

impl fmt::Debug for HandshakePermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandshakePermit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    type Permits = (ConnectionPermit, HandshakePermit);

    fn admission(limits: TransportLimits) -> Arc<Admission> {
        Admission::new(limits, CancellationToken::new())
    }

    fn accept(admission: &Arc<Admission>, ip: IpAddr) -> Permits {
        accept_as(admission, ip, Address::Claimed)
    }

    fn accept_as(admission: &Arc<Admission>, ip: IpAddr, address: Address) -> Permits {
        match admission.decide(ip, address) {
            Decision::Accept(connection, handshake) => (connection, handshake),
            other => panic!("{other:?}"),
        }
    }

    fn refused(admission: &Arc<Admission>, ip: IpAddr) -> LimitReached {
        match admission.decide(ip, Address::Validated) {
            Decision::Refuse(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn connections_beyond_a_limit_are_refused_until_a_permit_is_dropped() {
        let admission = admission(TransportLimits {
            max_connections: 2,
            max_connections_per_ip: 1,
            ..TransportLimits::default()
        });
        let first = accept(&admission, IP);
        assert_eq!(refused(&admission, IP), LimitReached::ConnectionsPerIp);
        let second = accept(&admission, "10.0.0.1".parse().unwrap());
        assert_eq!(refused(&admission, "10.0.0.2".parse().unwrap()), LimitReached::Connections);
        drop(first);
        let _first = accept(&admission, IP);
        drop(second);
        admission.draining.cancel();
        assert_eq!(refused(&admission, "10.0.0.1".parse().unwrap()), LimitReached::Draining);
        assert_eq!(admission.connections.lock().by_ip.len(), 1);
    }

    #[test]
    fn addresses_of_one_ipv6_network_share_a_limit() {
        let admission =
            admission(TransportLimits { max_connections_per_ip: 1, ..TransportLimits::default() });
        let _first = accept(&admission, "2001:db8::1".parse().unwrap());
        assert_eq!(
            refused(&admission, "2001:db8::2".parse().unwrap()),
            LimitReached::ConnectionsPerIp
        );
        let _other = accept(&admission, "2001:db8:0:1::1".parse().unwrap());
        let _mapped = accept(&admission, "::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(
            refused(&admission, "10.0.0.1".parse().unwrap()),
            LimitReached::ConnectionsPerIp
        );
    }

    /// Tests half-open handshakes of two addresses, at a tenth of the default limits.
    #[test]
    fn half_open_handshakes_of_two_addresses_do_not_refuse_a_third() {
        let limits = TransportLimits {
            max_handshakes: 204,
            max_handshakes_per_ip: 25,
            retry_above: 25,
            ..TransportLimits::default()
        };
        let admission = admission(limits);
        let mut half_open = Vec::new();
        for attempt in 0..2_000 {
            let greedy: IpAddr = format!("10.0.0.{}", attempt % 2).parse().unwrap();
            match admission.decide(greedy, Address::Claimed) {
                Decision::Accept(connection, handshake) => half_open.push((connection, handshake)),
                Decision::Retry => {
                    if let Decision::Accept(connection, handshake) =
                        admission.decide(greedy, Address::Validated)
                    {
                        half_open.push((connection, handshake));
                    }
                }
                Decision::Refuse(_) => {}
            }
        }
        assert_eq!(half_open.len(), 25 + 2 * 25, "the unvalidated ones and two limits");
        assert!(admission.is_under_pressure());
        let third = "2001:db8::1".parse().unwrap();
        for _ in 0..25 {
            half_open.push(accept_as(&admission, third, Address::Validated));
        }
        let neighbour = "2001:db8::2".parse().unwrap();
        assert_eq!(refused(&admission, neighbour), LimitReached::HandshakesPerIp);
        half_open.clear();
        assert!(!admission.is_under_pressure());
        assert!(admission.handshakes_by_ip.lock().is_empty());
    }

    #[test]
    fn a_spoofed_address_does_not_use_up_the_limit_of_its_owner() {
        let limits = TransportLimits {
            max_handshakes_per_ip: 1,
            retry_above: 9,
            ..TransportLimits::default()
        };
        let admission = admission(limits);
        let _spoofed: Vec<_> = (0..8).map(|_| accept(&admission, IP)).collect();
        let owner = admission.decide(IP, Address::Validated);
        assert!(matches!(owner, Decision::Accept(..)), "{owner:?}");
        assert_eq!(refused(&admission, IP), LimitReached::HandshakesPerIp);
    }

    #[test]
    fn retries_start_at_the_limit_and_end_at_half_of_it() {
        let admission = admission(TransportLimits {
            retry_above: 4,
            max_handshakes: 6,
            ..TransportLimits::default()
        });
        let mut accepted: Vec<_> = (0..4).map(|_| accept(&admission, IP)).collect();
        assert!(matches!(admission.decide(IP, Address::Claimed), Decision::Retry));
        for _ in 0..2 {
            accepted.push(accept_as(&admission, IP, Address::Validated));
        }
        assert_eq!(refused(&admission, IP), LimitReached::Handshakes);
        accepted.truncate(3);
        assert!(matches!(admission.decide(IP, Address::Claimed), Decision::Retry));
        accepted.truncate(2);
        accepted.push(accept(&admission, IP));
    }
}
