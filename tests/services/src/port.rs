//! Ports of 127.0.0.1 that stay one test's own while its server is down, killed or starting again.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::Context as _;
use rand::Rng as _;

/// Below the ports that Linux gives to outgoing connections, which could take the port of a server
/// that is down.
const RANGE: std::ops::Range<u16> = 20_000..32_000;
const TRIES: usize = 1_000;

/// A TCP port that is reserved among all tests of this machine until this is dropped.
///
/// The claim is the UDP socket of the same number: the kernel gives it to one process, and takes it
/// back when that dies.
#[derive(Debug)]
pub(crate) struct Port {
    _claim: UdpSocket,
    number: u16,
}

impl Port {
    pub(crate) fn reserve() -> anyhow::Result<Self> {
        let mut random = rand::rngs::OsRng;
        (0..TRIES)
            .find_map(|_| Self::claim(random.gen_range(RANGE)))
            .with_context(|| format!("no free port of 127.0.0.1 in {RANGE:?} after {TRIES} tries"))
    }

    fn claim(number: u16) -> Option<Self> {
        let claim = UdpSocket::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
        // A server that is none of ours may listen there, on this address or on all.
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
    fn a_reserved_port_is_free_for_tcp_and_nobody_else_gets_it() {
        let port = Port::reserve().unwrap();
        assert!(Port::claim(port.number()).is_none(), "it is taken");
        let listener = TcpListener::bind(port.addr()).expect("its holder may listen");
        let number = port.number();
        drop((listener, port));
        assert!(Port::claim(number).is_some(), "it is free again");
    }

    #[test]
    fn a_port_where_somebody_listens_is_not_taken() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(Port::claim(listener.local_addr().unwrap().port()).is_none());
    }
}
