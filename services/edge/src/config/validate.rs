//! The bounds of the settings, and the rules between them.

use std::time::Duration;

use qpq_rpc::AnswerMemory;
use qpq_runtime::config::{Broken, Node as _, Settings, Size};

use super::{Config, Generate};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest duration. Sums of such durations do not overflow.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// The largest payload of a frame.
const LARGEST_PAYLOAD: u64 = qpq_wire::MAX_PAYLOAD as u64;

/// The settings that only an edge of a cluster uses, except those that make the server an edge.
const OF_CLUSTERS: &[&str] = &[
    "postgres.password_file",
    "postgres.ca",
    "postgres.connections",
    "postgres.timeout",
    "redis.password_file",
    "redis.ca",
    "redis.timeout",
    "nats.password_file",
    "nats.ca",
    "cluster.edge",
    "cluster.namespace",
    "cluster.migrate",
    "cluster.max_clock_skew",
    "cluster.start_timeout",
    "cluster.poll",
    "cluster.lease",
    "cluster.session_cache",
    "cluster.rotate_ticket_keys",
];
/// The settings that only a single node uses. `data_dir` is accepted, because an image for both
/// kinds of server sets it.
const OF_SINGLE_NODES: &[&str] = &["tls.generate", "tls.names"];
/// The settings of a certificate that is created.
const OF_CREATION: &[&str] = &["tls.names"];

impl Settings for Config {
    fn validate(&self) -> Vec<Broken> {
        let mut broken = self.broken_values();
        broken.extend(self.cluster_sections().broken());
        broken.extend(self.half_named_certificate());
        broken.extend(self.settings_without_effect());
        broken.extend(self.bucket_of_single_node());
        broken
    }
}

impl Config {
    /// Returns the values that break a rule. Accepts a cluster with missing settings, because some
    /// programs need only a part of them.
    pub fn broken_values(&self) -> Vec<Broken> {
        let mut broken = Vec::new();
        let mut must = |holds: bool, path, be: &str| {
            if !holds {
                broken.push(Broken { path, must_be: be.into() });
            }
        };
        self.check_times(&mut must);
        self.check_sizes(&mut must);
        self.check_transport(&mut must);
        self.check_cluster(&mut must);
        let domain_is_plain = self
            .domain
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-'));
        must(
            domain_is_plain && !self.domain.is_empty(),
            "domain",
            "a domain name in lower case, as in example.org",
        );
        must(self.admins().is_ok(), "admin.usernames", "valid usernames");
        must(
            self.session.idle <= self.session.absolute,
            "session.idle",
            "at most session.absolute",
        );
        must(
            self.delivery.default_ttl <= self.delivery.max_ttl,
            "delivery.default_ttl",
            "at most delivery.max_ttl",
        );
        must(
            self.delivery.default_wait <= self.delivery.max_wait,
            "delivery.default_wait",
            "at most delivery.max_wait",
        );
        broken
    }

    /// Checks that the configuration of an edge names both certificate and key, or neither. With
    /// one alone, an edge would use the certificate of the shared directory.
    fn half_named_certificate(&self) -> Option<Broken> {
        self.cluster_sections().secrets_dir()?;
        let path = match (&self.tls.cert, &self.tls.key) {
            (Some(_), None) => "tls.key",
            (None, Some(_)) => "tls.cert",
            _ => return None,
        };
        let must_be = "given too: an edge uses the certificate in cluster.secrets_dir, or the one \
                       that tls.cert and tls.key name together";
        Some(Broken { path, must_be: must_be.into() })
    }

    /// Returns the settings that the rest of the configuration gives no effect.
    ///
    /// A section that has a switch (`limits.enabled`, `trace.endpoint`, `http.listen`) may keep its
    /// other settings while it is off.
    fn settings_without_effect(&self) -> Vec<Broken> {
        let sections = self.cluster_sections();
        let mut unused = Vec::new();
        let mut add = |paths: &'static [&'static str], reason: &str| {
            let changed = |path: &&&str| shown(self, path) != shown(&Self::default(), path);
            let broken = |path: &&'static str| Broken { path, must_be: reason.into() };
            unused.extend(paths.iter().filter(changed).map(broken));
        };
        if sections.is_single_node() {
            add(OF_CLUSTERS, "left out: the server is a single node, and only an edge uses this");
            if self.tls.generate.0 == Generate::Never {
                add(OF_CREATION, "left out: with tls.generate = \"never\" none is created");
            }
        } else if sections.secrets_dir().is_some() {
            add(OF_SINGLE_NODES, "left out: an edge creates no certificate");
        }
        unused
    }

    /// Checks that only an edge of a cluster names a bucket, which a single node would not use.
    fn bucket_of_single_node(&self) -> Option<Broken> {
        let is_unused =
            self.blobs.endpoint.is_some() && self.cluster_sections().secrets_dir().is_none();
        let must_be = "left out: a single node stores blobs in its data directory".into();
        is_unused.then_some(Broken { path: "blobs.endpoint", must_be })
    }

    fn check_times(&self, must: &mut impl FnMut(bool, &'static str, &str)) {
        let (transport, delivery, session) = (&self.transport, &self.delivery, &self.session);
        let times = [
            ("tls.reload_interval", self.tls.reload_interval),
            ("trace.timeout", self.trace.timeout),
            ("transport.handshake_timeout", transport.handshake_timeout),
            (
                "transport.handshake_timeout_under_pressure",
                transport.handshake_timeout_under_pressure,
            ),
            ("transport.idle_timeout", transport.idle_timeout),
            ("transport.request_timeout", transport.request_timeout),
            ("transport.silent_peer_timeout", transport.silent_peer_timeout),
            ("transport.stalled_reply_timeout", transport.stalled_reply_timeout),
            ("delivery.default_ttl", delivery.default_ttl),
            ("delivery.max_ttl", delivery.max_ttl),
            ("delivery.default_wait", delivery.default_wait),
            ("delivery.max_wait", delivery.max_wait),
            ("reports.max_age", self.reports.max_age),
            ("session.idle", session.idle),
            ("session.absolute", session.absolute),
            ("postgres.timeout", self.postgres.timeout),
            ("redis.timeout", self.redis.timeout),
            ("cluster.start_timeout", self.cluster.start_timeout),
            ("cluster.poll", self.cluster.poll),
            ("cluster.lease", self.cluster.lease),
            ("cluster.session_cache", self.cluster.session_cache),
            ("blobs.upload_idle", self.blobs.upload_idle),
            ("blobs.lifetime", self.blobs.lifetime),
        ];
        for (path, time) in times {
            must(!time.is_zero() && time <= LONGEST, path, "more than zero and at most 3650d");
        }
        must(delivery.recent_ids <= LONGEST, "delivery.recent_ids", "at most 3650d");
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3_600));
        must(
            (second..=hour).contains(&self.cluster.max_clock_skew),
            "cluster.max_clock_skew",
            "between 1s and 1h",
        );
        if let Some(interval) = self.cluster.rotate_ticket_keys {
            must(
                (300 * second..=24 * hour).contains(&interval),
                "cluster.rotate_ticket_keys",
                "between 5m and 24h: a ticket is valid for two intervals, and clients expect 12h",
            );
        }
        must(
            (second..=50 * second).contains(&self.blobs.timeout),
            "blobs.timeout",
            "between 1s and 50s: a call has 120 s, and a request may be repeated",
        );
        let whole_wait = Duration::from_secs(20);
        must(self.answers.wait <= whole_wait, "answers.wait", "at most 20s: a call has 30 s");
        must(self.drain.timeout <= DAY, "drain.timeout", "at most 1d");
    }

    fn check_sizes(&self, must: &mut impl FnMut(bool, &'static str, &str)) {
        let (delivery, keys, answers) = (&self.delivery, &self.keys, &self.answers);
        let fits = |size: Size| (1..=LARGEST_PAYLOAD - 4_096).contains(&size.0);
        must(
            fits(delivery.max_payload),
            "delivery.max_payload",
            "between 1B and 4092KiB, so that it fits a frame",
        );
        must(
            fits(keys.max_package),
            "keys.max_package",
            "between 1B and 4092KiB, so that it fits a frame",
        );
        must(
            answers.connection.0 >= AnswerMemory::MIN as u64,
            "answers.connection",
            "at least 4MiB, one answer",
        );
        must(
            answers.account >= answers.connection,
            "answers.account",
            "at least answers.connection",
        );
        must(
            (answers.account.0..=1 << 40).contains(&answers.process.0),
            "answers.process",
            "at least answers.account and at most 1024GiB",
        );
        must(delivery.max_messages > 0, "delivery.max_messages", "at least 1");
        must(
            delivery.max_bytes >= delivery.max_payload,
            "delivery.max_bytes",
            "at least delivery.max_payload, so that a message fits",
        );
        must(
            (1..=1_000).contains(&delivery.sender_share),
            "delivery.sender_share",
            "between 1 (no limit) and 1000",
        );
        must(
            delivery.max_batch_bytes >= delivery.max_payload,
            "delivery.max_batch_bytes",
            "at least delivery.max_payload, so that a message fits",
        );
        must(self.reports.max_per_account > 0, "reports.max_per_account", "at least 1");
        must(keys.max_packages > 0, "keys.max_packages", "at least 1");
        must(self.auth.waiting_logins > 0, "auth.waiting_logins", "at least 1");
        self.check_blobs(must);
    }

    fn check_blobs(&self, must: &mut impl FnMut(bool, &'static str, &str)) {
        let blobs = &self.blobs;
        must(
            (1..=50 << 20).contains(&blobs.max_bytes.0),
            "blobs.max_bytes",
            "between 1B and 50MiB, the maximum of the protocol",
        );
        must(blobs.quota.0 <= 1 << 50, "blobs.quota", "at most 1048576GiB");
        must(blobs.max_staged.0 <= 1 << 50, "blobs.max_staged", "at most 1048576GiB");
        must((1..=1_000).contains(&blobs.max_uploads), "blobs.max_uploads", "between 1 and 1000");
        if let Some(endpoint) = &blobs.endpoint {
            let is_url = endpoint.starts_with("https://") || endpoint.starts_with("http://");
            must(is_url, "blobs.endpoint", "a URL like https://s3.example.org");
        }
        must(!blobs.bucket.is_empty(), "blobs.bucket", "the name of a bucket");
        if let Some(missing) = blobs.missing() {
            must(
                false,
                missing,
                "given too: a bucket needs blobs.endpoint, blobs.access_key_file and \
                 blobs.secret_key_file",
            );
        }
    }

    fn check_transport(&self, must: &mut impl FnMut(bool, &'static str, &str)) {
        let transport = &self.transport;
        must(transport.max_connections > 0, "transport.max_connections", "at least 1");
        must(
            transport.max_connections_per_ip > 0,
            "transport.max_connections_per_ip",
            "at least 1",
        );
        must(transport.max_handshakes > 0, "transport.max_handshakes", "at least 1");
        must(transport.max_handshakes_per_ip > 0, "transport.max_handshakes_per_ip", "at least 1");
        must(
            transport.max_request_bytes_per_connection.0 >= LARGEST_PAYLOAD,
            "transport.max_request_bytes_per_connection",
            "at least 4MiB, one request",
        );
        must(
            transport.max_request_bytes_per_ip >= transport.max_request_bytes_per_connection,
            "transport.max_request_bytes_per_ip",
            "at least transport.max_request_bytes_per_connection",
        );
        must(
            (transport.max_request_bytes_per_ip.0..=1 << 40)
                .contains(&transport.max_request_bytes.0),
            "transport.max_request_bytes",
            "at least transport.max_request_bytes_per_ip and at most 1024GiB",
        );
        must(transport.min_reply_rate.0 > 0, "transport.min_reply_rate", "at least 1B");
        must(
            (1..=65_536).contains(&transport.max_streams),
            "transport.max_streams",
            "between 1 and 65536",
        );
    }

    fn check_cluster(&self, must: &mut impl FnMut(bool, &'static str, &str)) {
        must(
            self.postgres.connections as usize > qpq_store_cluster::COMMITTERS,
            "postgres.connections",
            "at least 3: two are used to commit messages",
        );
        let namespace = &self.cluster.namespace;
        must(
            !namespace.is_empty()
                && namespace.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)),
            "cluster.namespace",
            "letters, digits, - and _",
        );
    }
}

/// Returns the value of the setting at `path` as text.
fn shown(config: &Config, path: &str) -> Option<String> {
    let mut values = Vec::new();
    config.show("", &mut values);
    values.into_iter().find_map(|(of, value)| (of == path).then_some(value)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_of_a_cluster_is_listed_as_one() {
        let mut values = Vec::new();
        Config::default().show("", &mut values);
        let needed = ["postgres.url", "redis.url", "nats.url", "cluster.secrets_dir"];
        let of_clusters: Vec<_> = values
            .iter()
            .map(|(path, _)| path.as_str())
            .filter(|path| {
                let sections = ["postgres.", "redis.", "nats.", "cluster."];
                sections.iter().any(|section| path.starts_with(section)) && !needed.contains(path)
            })
            .collect();
        assert_eq!(of_clusters, OF_CLUSTERS);
        let is_setting = |path: &&str| values.iter().any(|(of, _)| of == path);
        assert!(OF_SINGLE_NODES.iter().chain(OF_CREATION).all(is_setting));
    }
}
