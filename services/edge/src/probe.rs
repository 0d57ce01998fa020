//! The server's look at itself from the outside: a handshake and a call over loopback. A process
//! whose socket task died looks alive to everything but this.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use qpq_proto::{Method as _, methods::Health};
use qpq_transport::{
    Certificates,
    client::{ConnectError, Dialer, Trust},
};

/// For the handshake and for the call, each.
const WITHIN: Duration = Duration::from_secs(4);

/// Connects to the server at `listening` and asks for its health. Whatever it answers shows that it
/// is alive, a refused connection too: that is a full or a draining server.
pub(crate) async fn alive(
    listening: SocketAddr,
    certificates: Arc<Certificates>,
) -> Result<(), String> {
    let dialer =
        Dialer::new(Trust::Pin(certificates.fingerprint())).map_err(|error| error.to_string())?;
    let dialing =
        dialer.with_connect_timeout(WITHIN).connect(reachable(listening), "localhost").await;
    let connection = match dialing {
        Err(ConnectError::Refused) => return Ok(()),
        // Says something of this process's descriptors and nothing of the server.
        Err(ConnectError::Socket(error)) => {
            tracing::warn!(%error, "liveness could not be checked: no socket for the probe");
            return Ok(());
        }
        connected => connected.map_err(|error| error.to_string())?,
    };
    let answer = connection.call(Health::INFO.id, Bytes::new(), 1, WITHIN).await;
    answer.map(|_| ()).map_err(|error| error.to_string())
}

/// Where this machine reaches what listens at `address`.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_is_reached_over_loopback_and_others_as_they_are() {
        let reached = |address: &str| reachable(address.parse().unwrap()).to_string();
        assert_eq!(reached("0.0.0.0:5001"), "127.0.0.1:5001");
        assert_eq!(reached("[::]:5001"), "[::1]:5001");
        assert_eq!(reached("10.0.0.1:5001"), "10.0.0.1:5001");
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_nobody_serves_is_not_alive() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.der"), dir.path().join("key.der"));
        let certificates =
            Certificates::load_or_create(&cert, &key, &["localhost".into()]).unwrap();
        let outcome = alive(silent.local_addr().unwrap(), certificates).await;
        assert_eq!(outcome, Err("the server did not answer in time".into()));
    }
}
