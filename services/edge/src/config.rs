//! Every setting of the server, declared once: `docs/configuration.md`, the environment variables
//! and `config show` come from here. To add one: a line in its section with a doc comment, its use
//! below or in `compose`, and `QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-server`.

use std::{collections::HashSet, net::SocketAddr, path::PathBuf, time::Duration};

use qpq_domain::Username;
use qpq_rpc::{AnswerMemory, SessionLifetimes};
use qpq_runtime::{
    config::{Broken, Choice, Leaf, Settings, Size, Value},
    http::Http,
    log::Log,
    section,
    trace::Trace,
};
use qpq_transport::{Limits as TransportLimits, Timeouts};

use crate::{
    Listen,
    budgets::Limits,
    cluster::{Cluster, Nats, PasswordFileError, Postgres, Redis, Sections},
};

/// Variables with our prefix that the client, the tests or the documentation read, and that we
/// therefore leave alone.
pub const FOREIGN_VARIABLES: &[&str] =
    &["QPQ_HOME", "QPQ_PASSWORD", "QPQ_PROFILE", "QPQ_SERVER", "QPQ_UPDATE_DOCS"];

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Longer than anything here is meant for, short enough that no sum of times overflows.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// What fits a frame.
const LARGEST_PAYLOAD: u64 = qpq_wire::MAX_PAYLOAD as u64;

section! {
    /// The whole configuration.
    pub struct Config {
        /// The UDP addresses that clients connect to. `[::]` listens on IPv6 and IPv4.
        listen: Listen = SocketAddr::from(([0, 0, 0, 0], 5001)).into(), flag: "--listen";
        /// The directory that holds everything: database, certificate, keys. Made, for its owner
        /// alone, if missing.
        data_dir: PathBuf = "data".into(), flag: "--data-dir";
        /// The server's own domain, what follows the `@` in its users' addresses. In lower case.
        domain: String = "localhost".into();
        /// The certificate that clients see.
        tls: Tls = Tls::default();
        /// Health and metrics over HTTP, unencrypted: keep it off public networks.
        http: Http = Http::default();
        /// Logging, to standard error.
        log: Log = Log::default();
        /// Traces of calls, for an OpenTelemetry collector.
        trace: Trace = Trace::default();
        /// How much the server bears from the network, and for how long. What is above is refused,
        /// never queued.
        transport: Transport = Transport::default();
        /// The memory for answers that wait for their clients. A page of messages is made smaller
        /// where it is short.
        answers: Answers = Answers::default();
        /// How often things may be asked for. [rpc.md](rpc.md) says which methods share a budget.
        limits: Limits = Limits::default();
        /// Messages and inboxes.
        delivery: Delivery = Delivery::default();
        /// KeyPackages.
        keys: Keys = Keys::default();
        /// What a login opens.
        session: Session = Session::default();
        /// Registration and login.
        auth: Auth = Auth::default();
        /// Administrators.
        admin: Admin = Admin::default();
        /// How the server stops.
        drain: Drain = Drain::default();
        /// Postgres, version 15 or newer, where a cluster keeps everything that is durable.
        postgres: Postgres = Postgres::default();
        /// Redis, version 7.0 or newer: queues that are being read, leases, waiters, rate limits.
        /// It may lose everything it holds.
        redis: Redis = Redis::default();
        /// NATS: word from edge to edge. All of it may get lost.
        nats: Nats = Nats::default();
        /// What this edge shares with the others of its cluster. A cluster needs `postgres.url`,
        /// `redis.url`, `nats.url` and `cluster.secrets_dir`; without all four the server runs
        /// alone, on its data directory.
        cluster: Cluster = Cluster::default();
    }
}

section! {
    /// The certificate that clients see.
    pub struct Tls {
        /// The certificate chain, in DER or PEM.
        cert: Option<PathBuf> = None,
            unset: "`server-cert.der` in the data directory", variable: "QPQ_TLS_CERT", flag: "--tls-cert";
        /// The private key, in DER or PEM.
        key: Option<PathBuf> = None,
            unset: "`server-key.der` in the data directory", variable: "QPQ_TLS_KEY", flag: "--tls-key";
        /// Whether a self-signed certificate is created, with its key, where neither file exists.
        /// Where this section names a file that does not exist, with a warning.
        generate: Generate = Generate::IfMissing;
        /// Names and IP addresses in a certificate that is created, besides the domain and
        /// `localhost`.
        names: Vec<String> = Vec::new();
        /// How often the files are looked at for a renewed certificate.
        reload_interval: Duration = qpq_transport::RELOAD_INTERVAL;
    }
}

section! {
    /// What the server bears from the network.
    pub struct Transport {
        /// Connections at a time. An idle one costs about 45 KiB.
        max_connections: usize = TransportLimits::default().max_connections;
        /// Connections at a time from one IP address. Leave room for those who share one.
        max_connections_per_ip: usize = TransportLimits::default().max_connections_per_ip;
        /// Handshakes at a time.
        max_handshakes: usize = TransportLimits::default().max_handshakes;
        /// Handshakes at a time from one IP address (IPv6: its /64). Leave room for those who share
        /// one.
        max_handshakes_per_ip: usize = TransportLimits::default().max_handshakes_per_ip;
        /// From so many handshakes at a time on, clients must first prove their address, which
        /// costs them a round trip.
        retry_above: usize = TransportLimits::default().retry_above;
        /// Calls in flight on one connection. Each takes 83 bytes on every connection, used or not.
        max_streams: u32 = TransportLimits::default().max_streams;
        /// How long a handshake may take.
        handshake_timeout: Duration = Timeouts::default().handshake;
        /// The same while at least `retry_above` handshakes are in progress.
        handshake_timeout_under_pressure: Duration = Timeouts::default().handshake_under_pressure;
        /// How long a client may be silent until its connection is dropped. Clients give a sign of
        /// life every 15 s.
        idle_timeout: Duration = Timeouts::default().idle;
        /// How long a request may take to arrive, from its first byte.
        request_timeout: Duration = Timeouts::default().request;
        /// How long a client may be silent until messages that it fetched and did not acknowledge
        /// are back in its inbox.
        silent_peer_timeout: Duration = Timeouts::default().silent_peer;
        /// How long a client may accept nothing of its answer until that is stopped; a third of it
        /// while the memory for answers is short.
        stalled_reply_timeout: Duration = Timeouts::default().stalled_reply;
        /// Bytes a second that a client must accept of an answer, over the whole of it and after
        /// `stalled_reply_timeout`; eight times as many while the memory for answers is short. What
        /// an answer that was stopped showed is in the inbox again.
        min_reply_rate: Size = Size(TransportLimits::default().min_reply_rate);
    }
}

section! {
    /// The memory for answers that wait for their clients.
    pub struct Answers {
        /// Memory for all answers. From three quarters of it on, clients must read faster.
        process: Size = Size(AnswerMemory::default().process as u64);
        /// Memory for the answers to one account, over all its connections.
        account: Size = Size(AnswerMemory::default().account as u64);
        /// Memory for the answers to one connection.
        connection: Size = Size(AnswerMemory::default().connection as u64);
        /// How long a call waits for memory before it is refused.
        wait: Duration = AnswerMemory::default().wait;
    }
}

section! {
    /// Messages and inboxes.
    pub struct Delivery {
        /// The largest payload of one message.
        max_payload: Size = Size(qpq_domain::Delivery::default().max_payload as u64);
        /// Messages queued in one inbox.
        max_messages: u64 = qpq_domain::Delivery::default().max_messages;
        /// Payload queued in one inbox.
        max_bytes: Size = Size(qpq_domain::Delivery::default().max_bytes);
        /// While an inbox is more than half full, one sender may hold at most one part of so many
        /// of it, in messages and in bytes. 1: no such limit.
        sender_share: u64 = qpq_domain::Delivery::default().sender_share;
        /// The largest BatchEnqueue: the payload times the recipients, or the sum of the payloads.
        max_batch_bytes: Size = Size(qpq_domain::Delivery::default().max_batch_bytes);
        /// The lifetime of a message whose sender gave none.
        default_ttl: Duration = qpq_domain::Delivery::default().default_ttl;
        /// The longest lifetime that a sender may ask for.
        max_ttl: Duration = qpq_domain::Delivery::default().max_ttl;
        /// How long a message id is remembered once its message is gone, so that a repeat is not
        /// delivered twice.
        recent_ids: Duration = qpq_domain::Delivery::default().recent_ids;
        /// How long FetchWait waits where the client names no time.
        default_wait: Duration = qpq_domain::Delivery::default().default_wait;
        /// The longest FetchWait.
        max_wait: Duration = qpq_domain::Delivery::default().max_wait;
    }
}

section! {
    /// KeyPackages.
    pub struct Keys {
        /// The largest KeyPackage.
        max_package: Size = Size(qpq_domain::KeyPackageCaps::default().max_bytes as u64);
        /// KeyPackages that one identity may have on the server.
        max_packages: u32 = qpq_domain::KeyPackageCaps::default().max_count;
        /// The MLS ciphersuites (RFC 9420 §17.1) whose KeyPackages are taken. Of the defaults
        /// 0x0001 and 0x0003 are checked in full; of others the signature is not.
        suites: Suites = Suites(qpq_rpc::Config::default().key_package_suites);
    }
}

section! {
    /// What a login opens.
    pub struct Session {
        /// How long it lasts from its last use.
        idle: Duration = SessionLifetimes::default().idle;
        /// How long it lasts from the login, however much it is used.
        absolute: Duration = SessionLifetimes::default().absolute;
    }
}

section! {
    /// Registration and login.
    pub struct Auth {
        /// Whether a registration must prove that it has the identity key's private half. A proof
        /// that is given is always checked.
        identity_proof: IdentityProof = IdentityProof::Optional;
        /// The scripts that a new username may mix (UTS 39): none but Latin with Japanese or
        /// Korean; in addition Latin with one other that is not Cyrillic or Greek; or any, symbols
        /// too. Accounts that exist keep their names.
        username_scripts: UsernameScripts = UsernameScripts::HighlyRestrictive;
        /// Logins and registrations that may wait for the processor before the next is told to come
        /// later.
        waiting_logins: usize = 256;
    }
}

section! {
    /// Administrators.
    pub struct Admin {
        /// Who may call the administrators' methods.
        usernames: Vec<String> = Vec::new();
    }
}

section! {
    /// How the server stops.
    pub struct Drain {
        /// How long calls in flight may go on after the first SIGTERM or SIGINT. A second one stops
        /// at once.
        timeout: Duration = qpq_transport::DRAIN_DEADLINE, variable: "QPQ_DRAIN_TIMEOUT";
    }
}

/// MLS ciphersuites, by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suites(pub Vec<u16>);

impl Leaf for Suites {
    fn kind() -> String {
        "list".into()
    }

    fn allowed() -> String {
        "a list of numbers, as in [\"0x0001\", \"0x0003\"], or 0x0001,0x0003 in a variable".into()
    }

    fn read(value: &Value) -> Option<Self> {
        let number = |text: &String| match text.strip_prefix("0x") {
            Some(hex) => u16::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        };
        let suites: Vec<_> =
            Vec::<String>::read(value)?.iter().map(number).collect::<Option<_>>()?;
        (!suites.is_empty()).then_some(Self(suites))
    }

    fn show(&self) -> Option<String> {
        Leaf::show(&self.0.iter().map(|suite| format!("{suite:#06x}")).collect::<Vec<_>>())
    }
}

/// The scripts that a new username may mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsernameScripts {
    HighlyRestrictive,
    ModeratelyRestrictive,
    Any,
}

impl Choice for UsernameScripts {
    const ALL: &'static [(&'static str, Self)] = &[
        ("highly-restrictive", Self::HighlyRestrictive),
        ("moderately-restrictive", Self::ModeratelyRestrictive),
        ("any", Self::Any),
    ];
}

impl From<UsernameScripts> for qpq_domain::UsernameScripts {
    fn from(scripts: UsernameScripts) -> Self {
        match scripts {
            UsernameScripts::HighlyRestrictive => Self::HighlyRestrictive,
            UsernameScripts::ModeratelyRestrictive => Self::ModeratelyRestrictive,
            UsernameScripts::Any => Self::Any,
        }
    }
}

/// Whether a certificate is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generate {
    IfMissing,
    Never,
}

impl Choice for Generate {
    const ALL: &'static [(&'static str, Self)] =
        &[("if_missing", Self::IfMissing), ("never", Self::Never)];
}

/// Whether a registration must prove its identity key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityProof {
    Optional,
    Required,
}

impl Choice for IdentityProof {
    const ALL: &'static [(&'static str, Self)] =
        &[("optional", Self::Optional), ("required", Self::Required)];
}

impl Settings for Config {
    fn validate(&self) -> Vec<Broken> {
        let mut broken = self.broken_values();
        broken.extend(self.cluster_sections().broken());
        broken.extend(self.half_named_certificate());
        broken
    }
}

impl Config {
    /// All rules but the one that a cluster is given whole or not at all: for programs that need
    /// only a part of it.
    pub fn broken_values(&self) -> Vec<Broken> {
        let mut broken = Vec::new();
        let mut must = |holds: bool, path, be: &str| {
            if !holds {
                broken.push(Broken { path, must_be: be.into() });
            }
        };
        self.check_times(&mut must);
        self.check_sizes(&mut must);
        let domain_is_plain = self
            .domain
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-'));
        must(
            domain_is_plain && !self.domain.is_empty(),
            "domain",
            "a domain name in lower case, as in example.org",
        );
        must(self.admins().is_ok(), "admin.usernames", "user names as they may be registered");
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

    /// What the cluster's database alone needs, for programs that are no edges. `opaque_setup`
    /// tells the cluster from others.
    pub fn cluster_database(
        &self,
        opaque_setup: [u8; 32],
    ) -> Result<qpq_store_cluster::Config, PasswordFileError> {
        self.cluster_sections().database(opaque_setup, self.delivery(), self.key_packages())
    }

    /// What makes an edge one of a cluster.
    pub(crate) fn cluster_sections(&self) -> Sections<'_> {
        Sections {
            postgres: &self.postgres,
            redis: &self.redis,
            nats: &self.nats,
            cluster: &self.cluster,
        }
    }

    /// Where certificate and key are.
    pub fn tls_files(&self) -> (PathBuf, PathBuf) {
        let place = |given: &Option<PathBuf>, name| {
            given.clone().unwrap_or_else(|| self.data_dir.join(name))
        };
        (place(&self.tls.cert, "server-cert.der"), place(&self.tls.key, "server-key.der"))
    }

    /// Certificate and key, if both are named.
    pub(crate) fn own_tls_files(&self) -> Option<(PathBuf, PathBuf)> {
        Some((self.tls.cert.clone()?, self.tls.key.clone()?))
    }

    /// An edge takes its certificate from the shared directory, unless the configuration names both
    /// files: one alone would be ignored.
    fn half_named_certificate(&self) -> Option<Broken> {
        self.cluster_sections().secrets_dir()?;
        let path = match (&self.tls.cert, &self.tls.key) {
            (Some(_), None) => "tls.key",
            (None, Some(_)) => "tls.cert",
            _ => return None,
        };
        let must_be = "given too: an edge uses the certificate in cluster.secrets_dir, or the one that tls.cert and \
                       tls.key name together";
        Some(Broken { path, must_be: must_be.into() })
    }

    /// What a certificate that is made is good for.
    pub fn tls_names(&self) -> Vec<String> {
        let mut names = vec![self.domain.clone()];
        let others = ["localhost", "127.0.0.1", "::1"].map(String::from);
        for name in others.into_iter().chain(self.tls.names.iter().cloned()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    pub fn transport(&self) -> qpq_transport::Config {
        let given = &self.transport;
        qpq_transport::Config {
            listen: self.listen.0.clone(),
            limits: TransportLimits {
                max_connections: given.max_connections,
                max_connections_per_ip: given.max_connections_per_ip,
                max_handshakes: given.max_handshakes,
                max_handshakes_per_ip: given.max_handshakes_per_ip,
                retry_above: given.retry_above,
                max_streams: given.max_streams,
                min_reply_rate: given.min_reply_rate.0,
            },
            timeouts: Timeouts {
                handshake: given.handshake_timeout,
                handshake_under_pressure: given.handshake_timeout_under_pressure,
                idle: given.idle_timeout,
                request: given.request_timeout,
                silent_peer: given.silent_peer_timeout,
                stalled_reply: given.stalled_reply_timeout,
            },
        }
    }

    pub fn delivery(&self) -> qpq_domain::Delivery {
        let given = &self.delivery;
        qpq_domain::Delivery {
            max_payload: bytes(given.max_payload),
            max_messages: given.max_messages,
            max_bytes: given.max_bytes.0,
            sender_share: given.sender_share,
            max_batch_bytes: given.max_batch_bytes.0,
            default_ttl: given.default_ttl,
            max_ttl: given.max_ttl,
            recent_ids: given.recent_ids,
            default_wait: given.default_wait,
            max_wait: given.max_wait,
        }
    }

    pub fn key_packages(&self) -> qpq_domain::KeyPackageCaps {
        qpq_domain::KeyPackageCaps {
            max_bytes: bytes(self.keys.max_package),
            max_count: self.keys.max_packages,
        }
    }

    pub fn rpc(&self) -> qpq_rpc::Config {
        qpq_rpc::Config {
            domain: self.domain.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            sessions: SessionLifetimes { idle: self.session.idle, absolute: self.session.absolute },
            identity_proof: match self.auth.identity_proof {
                IdentityProof::Optional => qpq_rpc::IdentityProof::Optional,
                IdentityProof::Required => qpq_rpc::IdentityProof::Required,
            },
            username_scripts: self.auth.username_scripts.into(),
            admins: self.admins().unwrap_or_default(),
            limits: self.limits.to_rpc(),
            delivery: self.delivery(),
            key_packages: self.key_packages(),
            key_package_suites: self.keys.suites.0.clone(),
            waiting_logins: self.auth.waiting_logins,
            answers: self.answers(),
        }
    }

    fn answers(&self) -> AnswerMemory {
        let given = &self.answers;
        AnswerMemory {
            process: bytes(given.process),
            account: bytes(given.account),
            connection: bytes(given.connection),
            wait: given.wait,
        }
    }

    fn admins(&self) -> Result<HashSet<Username>, qpq_domain::InvalidUsername> {
        self.admin.usernames.iter().map(|name| Username::parse(name)).collect()
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
            ("session.idle", session.idle),
            ("session.absolute", session.absolute),
            ("postgres.timeout", self.postgres.timeout),
            ("redis.timeout", self.redis.timeout),
            ("cluster.start_timeout", self.cluster.start_timeout),
            ("cluster.poll", self.cluster.poll),
            ("cluster.lease", self.cluster.lease),
            ("cluster.session_cache", self.cluster.session_cache),
        ];
        for (path, time) in times {
            must(!time.is_zero() && time <= LONGEST, path, "more than nothing and at most 3650d");
        }
        must(delivery.recent_ids <= LONGEST, "delivery.recent_ids", "at most 3650d");
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3_600));
        must(
            (second..=hour).contains(&self.cluster.max_clock_skew),
            "cluster.max_clock_skew",
            "between 1s and 1h",
        );
        let whole_wait = Duration::from_secs(20);
        must(self.answers.wait <= whole_wait, "answers.wait", "at most 20s: a call has 30 s");
        must(self.drain.timeout <= DAY, "drain.timeout", "at most 1d");
    }

    fn check_sizes(&self, must: &mut impl FnMut(bool, &'static str, &str)) {
        let (transport, delivery, keys) = (&self.transport, &self.delivery, &self.keys);
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
        let answers = &self.answers;
        must(
            answers.connection.0 >= AnswerMemory::LEAST as u64,
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
        must(keys.max_packages > 0, "keys.max_packages", "at least 1");
        must(transport.max_connections > 0, "transport.max_connections", "at least 1");
        must(
            transport.max_connections_per_ip > 0,
            "transport.max_connections_per_ip",
            "at least 1",
        );
        must(transport.max_handshakes > 0, "transport.max_handshakes", "at least 1");
        must(transport.max_handshakes_per_ip > 0, "transport.max_handshakes_per_ip", "at least 1");
        must(transport.min_reply_rate.0 > 0, "transport.min_reply_rate", "at least 1B");
        must(
            (1..=65_536).contains(&transport.max_streams),
            "transport.max_streams",
            "between 1 and 65536",
        );
        must(self.auth.waiting_logins > 0, "auth.waiting_logins", "at least 1");
        must(
            self.postgres.connections as usize > qpq_store_cluster::COMMITTERS,
            "postgres.connections",
            "at least 3: two commit messages, and others must get through",
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

fn bytes(size: Size) -> usize {
    usize::try_from(size.0).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
