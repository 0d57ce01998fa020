//! The settings that a client needs before it connects.

use std::{net::Ipv6Addr, path::PathBuf, time::Duration};

use qpq_domain::Backoff;
use qpq_transport::Fingerprint;
use serde::{Deserialize, Serialize};

/// The port of a server whose address has none.
pub const DEFAULT_PORT: u16 = 5001;

/// The proof of identity that a server must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    /// Any certificate at the first connection; every later one must have the same. The caller
    /// saves the fingerprint that [`Client::connect`](crate::Client::connect) returns, and passes
    /// it as [`Trust::Pinned`] from then on.
    FirstUse,
    /// The key with this fingerprint. A fingerprint of the whole certificate, which earlier
    /// releases pinned, is also accepted until the certificate is renewed.
    Pinned(#[serde(with = "fingerprint_text")] Fingerprint),
    /// Either of two keys, for the time in which the operator replaces one by the other.
    PinnedEither(#[serde(with = "fingerprints_text")] [Fingerprint; 2]),
    /// A certificate for the server's name, issued by an authority in this file (PEM or DER).
    Authority(PathBuf),
    /// A certificate for the server's name, issued by an authority that the system trusts.
    System,
}

impl Trust {
    /// Returns the trust to use after the user trusts a server whose key is `seen`.
    ///
    /// If a certificate or nothing was pinned before, this is the key itself.
    #[must_use]
    pub fn settled(self, seen: Fingerprint) -> Self {
        match self {
            Self::FirstUse | Self::Pinned(_) => Self::Pinned(seen),
            other => other,
        }
    }
}

/// The options of a client: the server, and the time limits of attempts.
#[derive(Debug, Clone)]
pub struct Options {
    /// `host`, `host:port` or `[ipv6]:port`; the port is 5001 when none is given.
    pub server: String,
    /// The proof of identity that the server must have.
    pub trust: Trust,
    /// The time for which a call is repeated, with reconnects, before it fails.
    pub patience: Duration,
    /// The delays between attempts to connect.
    pub backoff: Backoff,
    /// The age at which the directory is asked again for a person's devices, before a message is
    /// sent.
    pub devices_every: Duration,
}

impl Options {
    /// Returns options with 30 s of patience, and a back-off from 200 ms to 30 s.
    pub fn new(server: impl Into<String>, trust: Trust) -> Self {
        Self {
            server: server.into(),
            trust,
            patience: Duration::from_secs(30),
            backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(30)),
            devices_every: Duration::from_secs(600),
        }
    }
}

/// Splits an address into host and port.
pub(crate) fn split_address(server: &str) -> Option<(&str, u16)> {
    let (host, port) = match server.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']')?;
            (host, after.strip_prefix(':').map_or_else(|| after.is_empty().then_some(""), Some)?)
        }
        None => match server.split_once(':') {
            // More than one colon outside brackets: an IPv6 address without a port.
            Some((_, rest)) if rest.contains(':') => {
                (Some(server).filter(|server| is_plainly_ipv6(server))?, "")
            }
            Some((host, port)) if !port.is_empty() => (host, port),
            Some(_) => return None,
            None => (server, ""),
        },
    };
    let port =
        if port.is_empty() { DEFAULT_PORT } else { port.parse().ok().filter(|port| *port != 0)? };
    (!host.is_empty()).then_some((host, port))
}

/// Returns whether `text` is an IPv6 address that cannot be meant as an address and a port.
///
/// `::1:5001` is an IPv6 address, but a person who writes it means `[::1]:5001`.
fn is_plainly_ipv6(text: &str) -> bool {
    let address = text.split('%').next().unwrap_or(text);
    let last = address.rsplit(':').next().unwrap_or_default();
    let may_be_port = last.len() >= 4 && last.bytes().all(|byte| byte.is_ascii_digit());
    let is_whole = !address.contains("::");
    address.parse::<Ipv6Addr>().is_ok() && (is_whole || !may_be_port)
}

mod fingerprint_text {
    use qpq_transport::Fingerprint;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        fingerprint: &Fingerprint,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_str(fingerprint)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Fingerprint, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

mod fingerprints_text {
    use qpq_transport::Fingerprint;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        fingerprints: &[Fingerprint; 2],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(fingerprints.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<[Fingerprint; 2], D::Error> {
        let [one, other] = <[String; 2]>::deserialize(from)?;
        Ok([one.parse().map_err(D::Error::custom)?, other.parse().map_err(D::Error::custom)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_kept_as_text_and_a_certificates_pin_becomes_its_keys() {
        let [certificate, key] = [1, 2].map(|n| Fingerprint::from([n; 32]));
        let of_earlier = format!("{{\"pinned\":\"{certificate}\"}}");
        let trust: Trust = serde_json::from_str(&of_earlier).unwrap();
        assert_eq!(trust, Trust::Pinned(certificate));
        assert_eq!(trust.settled(key), Trust::Pinned(key));
        let both = Trust::PinnedEither([certificate, key]);
        let text = serde_json::to_string(&both).unwrap();
        assert_eq!(serde_json::from_str::<Trust>(&text).unwrap(), both);
        assert_eq!(both.clone().settled(key), both, "the other key may still be shown");
        assert_eq!(Trust::System.settled(key), Trust::System);
    }

    #[test]
    fn addresses_are_split_into_host_and_port_and_malformed_ones_refused() {
        for (address, expected) in [
            ("example.org", Some(("example.org", 5001))),
            ("example.org:443", Some(("example.org", 443))),
            ("127.0.0.1:1", Some(("127.0.0.1", 1))),
            ("[::1]:7", Some(("::1", 7))),
            ("[::1]", Some(("::1", 5001))),
            ("::1", Some(("::1", 5001))),
            ("2001:db8:0:0:0:0:0:5001", Some(("2001:db8:0:0:0:0:0:5001", 5001))),
            ("[2001:db8::5001]", Some(("2001:db8::5001", 5001))),
            ("[fe80::1%eth0]:7", Some(("fe80::1%eth0", 7))),
            ("fe80::1%eth0", Some(("fe80::1%eth0", 5001))),
            ("::1:5001", None),
            ("2001:db8:0:0:0:0:0:1:5001", None),
            ("host:1:2", None),
            ("", None),
            (":1", None),
            ("host:", None),
            ("host:0", None),
            ("host:70000", None),
            ("host:x", None),
            ("[::1", None),
            ("[::1]x", None),
            ("[]:5", None),
        ] {
            assert_eq!(split_address(address), expected, "{address}");
        }
    }
}
