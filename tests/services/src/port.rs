//! Ports of 127.0.0.1 that stay reserved for a test while its server is stopped, killed or
//! restarted.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::Context as _;
use rand::Rng as _;

/// The ports to reserve. They are below Linux's ports for outgoing connections, which could use the
/// port of a stopped server.
const RANGE: std::ops::Range<u16> = 20_000..32_000;
const MAX_ATTEMPTS: usize = 1_000;

/// A TCP port that is reserved among all tests of this machine. Dropping it releases the port.
///
/// The reservation is the UDP socket with the same number: the kernel gives it to one process and
/// releases it when the process ends.
#[derive(Debug)]
pub(crate) struct Port {
    _claim: UdpSocket,
    number: u16,
}

impl Port {
    pub(crate) fn reserve() -> anyhow::Result<Self> {
        let mut random = rand::rngs::OsRng;
        (0..MAX_ATTEMPTS).find_map(|_| Self::claim(random.gen_range(RANGE))).with_context(|| {
            format!("no free port of 127.0.0.1 in {RANGE:?} after {MAX_ATTEMPTS} tries")
        })
    }

    fn claim(number: u16) -> Option<Self> {
        let claim = UdpSocket::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
        // Another server may listen on the port, on this address or on all.
        drop(TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?);
        Some(Self { _claim: claim, number })
    }

    pub(crate) const fn number(&self) -> u16 {
        self.number
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_is_free_for_tcp_and_cannot_be_reserved_again() {
        let port = Port::reserve().unwrap();
        assert!(Port::claim(port.number()).is_none(), "it is taken");
        let listener = TcpListener::bind(port.addr()).expect("its holder may listen");
        let number = port.number();
        drop((listener, port));
        assert!(Port::claim(number).is_some(), "it is free again");
    }

    #[test]
    fn a_port_with_a_listener_is_not_reserved() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(Port::claim(listener.local_addr().unwrap().port()).is_none());
    }
}
