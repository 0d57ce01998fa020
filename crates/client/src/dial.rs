//! Connects to a server by its name: looks the name up, and tries its addresses one after the
//! other. Each attempt begins a little later than the one before, without waiting for that to fail
//! (RFC 8305).

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use qpq_transport::client::{self as transport, Connection, Dialer};
use tokio::{net::lookup_host, time::sleep};

use crate::{
    error::{ConnectError, NoConnection},
    options::{Options, Trust, split_address},
};

/// The time after which the next address is also tried.
const HEAD_START: Duration = Duration::from_millis(250);
/// The maximum number of addresses that are tried.
const MAX_ADDRESSES: usize = 8;

/// A server by its name.
#[derive(Debug)]
pub(crate) struct Target {
    host: String,
    port: u16,
}

/// The reason why there is no connection.
#[derive(Debug)]
pub(crate) enum Failed {
    /// Further attempts would fail, too.
    Permanent(ConnectError),
    /// A later attempt may succeed.
    Temporary(NoConnection),
}

impl Target {
    pub(crate) fn new(options: &Options) -> Result<Self, ConnectError> {
        let (host, port) =
            split_address(&options.server).ok_or_else(|| ConnectError::Misconfigured {
                reason: format!(
                    "{:?} is not a server address: write host, host:port or, for IPv6, [::1]:5001",
                    options.server
                ),
            })?;
        Ok(Self { host: host.to_owned(), port })
    }

    /// Returns the name for which the server's certificate must be issued: the host without a zone
    /// id.
    fn name(&self) -> &str {
        self.host.split('%').next().unwrap_or(&self.host)
    }

    /// Connects from a new UDP port, to the address that answers first.
    pub(crate) async fn dial(&self, dialer: &Dialer) -> Result<Connection, Failed> {
        let found = lookup_host((self.host.as_str(), self.port)).await.map_err(|error| {
            Failed::Temporary(format!("cannot look up {}: {error}", self.host).into())
        })?;
        let addresses: Vec<_> = found.take(MAX_ADDRESSES).collect();
        let head_start = head_start(&addresses);
        let mut attempts: FuturesUnordered<_> = (0..)
            .zip(addresses)
            .map(|(place, address)| async move {
                sleep(head_start * place).await;
                dialer.connect(address, self.name()).await
            })
            .collect();
        let mut failure = Failed::Temporary(format!("{} has no address", self.host).into());
        while let Some(outcome) = attempts.next().await {
            match outcome.map_err(Failed::from) {
                Ok(connection) => return Ok(connection),
                Err(failed) if !matches!(failure, Failed::Permanent(_)) => failure = failed,
                Err(_) => {}
            }
        }
        Err(failure)
    }
}

/// Returns the time between attempts. Addresses of this machine are tried together: the server may
/// listen on any of them, and the attempts load no network.
fn head_start(addresses: &[SocketAddr]) -> Duration {
    let is_here = addresses.iter().all(|address| address.ip().is_loopback());
    if is_here { Duration::ZERO } else { HEAD_START }
}

impl From<transport::ConnectError> for Failed {
    fn from(error: transport::ConnectError) -> Self {
        use transport::ConnectError as Seen;
        let text = error.to_string();
        match error {
            Seen::Refused => Self::Temporary(NoConnection::Full),
            Seen::TimedOut | Seen::Lost(_) | Seen::Socket(_) => Self::Temporary(text.into()),
            Seen::PinMismatch { expected, seen } => {
                Self::Permanent(ConnectError::PinMismatch { expected, seen })
            }
            Seen::Untrusted(reason) => Self::Permanent(ConnectError::Untrusted { reason }),
            Seen::WrongProtocol | Seen::NoCertificate | Seen::Tls(_) => {
                Self::Permanent(ConnectError::NotQpq { reason: text })
            }
            Seen::Invalid { .. } => Self::Permanent(ConnectError::Misconfigured { reason: text }),
        }
    }
}

/// Returns a dialer that checks servers against `trust`.
pub(crate) fn dialer(trust: &Trust) -> Result<Dialer, ConnectError> {
    let trust = match trust {
        Trust::FirstUse => transport::Trust::FirstUse,
        Trust::Pinned(fingerprint) => transport::Trust::Pin(*fingerprint),
        Trust::PinnedEither(fingerprints) => transport::Trust::PinEither(*fingerprints),
        Trust::Authority(path) => transport::Trust::CaFile(path.clone()),
        Trust::System => transport::Trust::SystemRoots,
    };
    Dialer::new(trust).map_err(|error| ConnectError::Misconfigured { reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_temporary_failures_are_retried() {
        use transport::{ConnectError as Seen, Lost};
        for temporary in [Seen::Refused, Seen::TimedOut, Seen::Lost(Lost::Reset)] {
            assert!(matches!(Failed::from(temporary), Failed::Temporary(_)));
        }
        let full = Failed::from(Seen::Refused);
        assert!(matches!(full, Failed::Temporary(NoConnection::Full)), "{full:?}");
        assert!(NoConnection::Full.to_string().starts_with("The server is full"));
        let strangers = [Seen::WrongProtocol, Seen::NoCertificate, Seen::Tls("alert".into())];
        for stranger in strangers {
            let failed = Failed::from(stranger);
            assert!(matches!(failed, Failed::Permanent(ConnectError::NotQpq { .. })), "{failed:?}");
        }
        let [expected, seen] = [1, 2].map(|n| qpq_transport::Fingerprint::from([n; 32]));
        let failed = Failed::from(Seen::PinMismatch { expected, seen });
        let Failed::Permanent(error) = failed else { panic!("{failed:?}") };
        assert_eq!(error, ConnectError::PinMismatch { expected, seen });
    }

    #[test]
    fn addresses_of_this_machine_are_tried_together_and_others_in_turn() {
        let [v4, v6, far] =
            ["127.0.0.1:1", "[::1]:1", "192.0.2.1:1"].map(|text| text.parse().unwrap());
        assert_eq!(head_start(&[v4, v6]), Duration::ZERO);
        assert_eq!(head_start(&[v4, far]), HEAD_START);
    }
}
