//! The liveness probe: a handshake and a call over loopback. No other check detects that the task
//! of the socket has ended.

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

/// Maximum time of the handshake, and of the call.
const WITHIN: Duration = Duration::from_secs(4);

/// Connects to the server at `listening` and calls Health.
///
/// Any answer shows that the server is alive. A refused connection is an answer too: a full or
/// draining server refuses connections.
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
        // This process has no free descriptors. The server may be alive.
        Err(ConnectError::Socket(error)) => {
            tracing::warn!(%error, "liveness probe skipped: no free socket");
            return Ok(());
        }
        connected => connected.map_err(|error| error.to_string())?,
    };
    let answer = connection.call(Health::INFO.id, Bytes::new(), 1, WITHIN).await;
    answer.map(|_| ()).map_err(|error| error.to_string())
}

/// Returns the address at which this machine reaches a socket bound to `address`.
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
    fn an_unspecified_address_is_reached_over_loopback_and_others_directly() {
        let reached = |address: &str| reachable(address.parse().unwrap()).to_string();
        assert_eq!(reached("0.0.0.0:5001"), "127.0.0.1:5001");
        assert_eq!(reached("[::]:5001"), "[::1]:5001");
        assert_eq!(reached("10.0.0.1:5001"), "10.0.0.1:5001");
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_without_a_server_is_not_alive() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.der"), dir.path().join("key.der"));
        let certificates =
            Certificates::load_or_create(&cert, &key, &["localhost".into()]).unwrap();
        let outcome = alive(silent.local_addr().unwrap(), certificates).await;
        assert_eq!(outcome, Err("the server did not answer in time".into()));
    }
}
