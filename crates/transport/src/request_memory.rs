//! The memory for requests: the maximum for a connection, an address and the whole server.
//!
//! A client may send many large requests before it has a session, and need not finish them. So the
//! buffer of a request grows only within these limits, and counts until the call has ended. Beyond
//! a limit the request is refused immediately: a request that waited would stop the flow of the
//! other requests on its connection.
//!
//! The sizes of buffers are counted, not announced lengths. So a client occupies only memory for
//! bytes that it has sent.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use metrics::Gauge;
use parking_lot::Mutex;
use qpq_wire::Refusal;

use crate::{
    admission::{network, subtract},
    config::TransportLimits,
};

/// The size in bytes up to which a buffer is not counted. Each stream of a connection can have one,
/// so small requests are never refused.
pub(crate) const UNCOUNTED: usize = 4096;

/// The memory for the requests of a server.
pub(crate) struct RequestMemory {
    process: usize,
    ip: usize,
    connection: usize,
    used: Mutex<Used>,
    gauge: Gauge,
}

#[derive(Default)]
struct Used {
    process: usize,
    by_ip: HashMap<IpAddr, usize>,
}

/// The memory for the requests of a connection.
pub(crate) struct ConnectionMemory {
    server: Arc<RequestMemory>,
    ip: IpAddr,
    used: AtomicUsize,
}

/// The memory of one request. Its drop returns the memory.
pub(crate) struct Reservation<'a> {
    connection: &'a ConnectionMemory,
    bytes: usize,
}

impl RequestMemory {
    pub(crate) fn new(limits: &TransportLimits, gauge: Gauge) -> Arc<Self> {
        gauge.set(0.0);
        Arc::new(Self {
            process: limits.max_request_bytes,
            ip: limits.max_request_bytes_per_ip,
            connection: limits.max_request_bytes_per_connection,
            used: Mutex::default(),
            gauge,
        })
    }

    /// Returns the memory of a new connection from `ip`.
    pub(crate) fn connection(self: &Arc<Self>, ip: IpAddr) -> ConnectionMemory {
        ConnectionMemory { server: Arc::clone(self), ip: network(ip), used: AtomicUsize::new(0) }
    }
}

impl ConnectionMemory {
    /// Starts a request that has no memory yet.
    pub(crate) fn reserve(&self) -> Reservation<'_> {
        Reservation { connection: self, bytes: 0 }
    }

    fn add(&self, bytes: usize) -> Result<(), Refusal> {
        let server = &self.server;
        // The lock also orders the changes of the connection's count.
        let mut used = server.used.lock();
        let connection = self.used.load(Ordering::Relaxed) + bytes;
        let ip = used.by_ip.get(&self.ip).copied().unwrap_or_default() + bytes;
        let process = used.process + bytes;
        if connection > server.connection || ip > server.ip {
            return Err(Refusal::ClientMemory);
        }
        if process > server.process {
            return Err(Refusal::ServerMemory);
        }
        self.used.store(connection, Ordering::Relaxed);
        used.by_ip.insert(self.ip, ip);
        used.process = process;
        server.gauge.increment(bytes as f64);
        Ok(())
    }

    fn remove(&self, bytes: usize) {
        let server = &self.server;
        let mut used = server.used.lock();
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        subtract(&mut used.by_ip, self.ip, bytes);
        used.process -= bytes;
        server.gauge.decrement(bytes as f64);
    }
}

impl Reservation<'_> {
    /// Increases the reservation to the memory of a buffer of `bytes`.
    ///
    /// # Errors
    /// [`Refusal::ClientMemory`] and [`Refusal::ServerMemory`], if a limit would be exceeded.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> Result<(), Refusal> {
        if bytes > self.bytes.max(UNCOUNTED) {
            self.connection.add(bytes - self.bytes)?;
            self.bytes = bytes;
        }
        Ok(())
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.connection.remove(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;

    fn memory() -> Arc<RequestMemory> {
        let limits = TransportLimits {
            max_request_bytes: 100 * KIB,
            max_request_bytes_per_ip: 60 * KIB,
            max_request_bytes_per_connection: 40 * KIB,
            ..TransportLimits::default()
        };
        RequestMemory::new(&limits, Gauge::noop())
    }

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn a_connection_an_address_and_the_server_have_limits() {
        let memory = memory();
        let (a, b, c) =
            (memory.connection(ip(1)), memory.connection(ip(1)), memory.connection(ip(2)));
        let (mut first, mut second) = (a.reserve(), a.reserve());
        first.grow_to(40 * KIB).expect("the whole memory of the connection");
        assert_eq!(second.grow_to(5 * KIB), Err(Refusal::ClientMemory), "of the connection");
        let (mut third, mut fourth) = (b.reserve(), c.reserve());
        assert_eq!(third.grow_to(21 * KIB), Err(Refusal::ClientMemory), "of the address");
        third.grow_to(20 * KIB).expect("the rest of the address");
        fourth.grow_to(40 * KIB).expect("another address");
        let other = memory.connection(ip(3));
        let mut fifth = other.reserve();
        assert_eq!(fifth.grow_to(5 * KIB), Err(Refusal::ServerMemory));
        drop(third);
        fifth.grow_to(20 * KIB).expect("returned memory");
        assert_eq!(fifth.grow_to(21 * KIB), Err(Refusal::ServerMemory));
        drop((first, second, fourth, fifth));
        let used = memory.used.lock();
        assert_eq!((used.process, used.by_ip.len()), (0, 0));
    }

    #[test]
    fn small_requests_are_never_refused() {
        let memory = memory();
        let connection = memory.connection(ip(1));
        let mut large = connection.reserve();
        large.grow_to(40 * KIB).unwrap();
        let mut small = connection.reserve();
        small.grow_to(UNCOUNTED).expect("not counted");
        assert_eq!(small.grow_to(UNCOUNTED + 1), Err(Refusal::ClientMemory));
    }

    #[test]
    fn addresses_of_one_ipv6_network_share_a_limit() {
        let memory = memory();
        let connection = |address: &str| memory.connection(address.parse().unwrap());
        let (a, b) = (connection("2001:db8::1"), connection("2001:db8::2"));
        let (mut first, mut second) = (a.reserve(), b.reserve());
        first.grow_to(40 * KIB).unwrap();
        assert_eq!(second.grow_to(21 * KIB), Err(Refusal::ClientMemory));
    }
}
