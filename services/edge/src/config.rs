//! Every setting of the server, declared once. `docs/configuration.md`, the environment variables
//! and `config show` are generated from this file.
//!
//! To add a setting, write a line with a doc comment in its section, check its bounds in
//! `config/validate.rs`, use it below or in `compose`, and run
//! `QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-server`.

use std::{collections::HashSet, net::SocketAddr, path::PathBuf, time::Duration};

use qpq_domain::{Choice, Username, UsernameScripts};
use qpq_rpc::{AnswerMemory, IdentityProof, RegistrationMode, SessionLifetimes};
use qpq_runtime::{
    config::{Leaf, Named, Size, Value},
    http::Http,
    log::Log,
    section,
    trace::Trace,
};
use qpq_transport::{Alpn, ClientAuth, Timeouts, TransportLimits};

use crate::{
    Listen,
    budgets::CallLimits,
    certificate::certificate_names,
    cluster::{Blobs, Cluster, Nats, PasswordFileError, Postgres, Redis, Sections},
};

/// Variables with the prefix `QPQ_` that only the client, the tests or the documentation read.
pub const FOREIGN_VARIABLES: &[&str] =
    &["QPQ_HOME", "QPQ_PASSWORD", "QPQ_PROFILE", "QPQ_SERVER", "QPQ_UPDATE_DOCS"];

section! {
    /// The whole configuration.
    pub struct Config {
        /// The UDP addresses that clients connect to. `[::]` listens on IPv6 and IPv4.
        listen: Listen = SocketAddr::from(([0, 0, 0, 0], 5001)).into(), flag: "--listen";
        /// The directory of the database, the certificate and the keys. Created if missing,
        /// readable for its owner alone.
        data_dir: PathBuf = "data".into(), flag: "--data-dir";
        /// The domain of the server, the part after the `@` in the addresses of its accounts. In
        /// lower case.
        domain: String = "localhost".into();
        /// The certificate that clients see.
        tls: Tls = Tls::default();
        /// Health and metrics over HTTP, unencrypted: keep it off public networks.
        http: Http = Http::default();
        /// Logging, to standard error.
        log: Log = Log::default();
        /// Traces of calls, for an OpenTelemetry collector.
        trace: Trace = Trace::default();
        /// Limits of connections, calls and times. Connections and calls beyond a limit are
        /// refused, never queued.
        transport: Transport = Transport::default();
        /// Memory for answers that wait for their clients. When memory is short, pages of messages
        /// are smaller.
        answers: Answers = Answers::default();
        /// Rate limits of calls. [rpc.md](rpc.md) lists the methods that share a budget.
        limits: CallLimits = CallLimits::default();
        /// Messages and inboxes.
        delivery: Delivery = Delivery::default();
        /// KeyPackages.
        keys: Keys = Keys::default();
        /// Reports to the administrators.
        reports: Reports = Reports::default();
        /// Blobs, the encrypted files of messages. A single node stores them in `blobs` in the data
        /// directory, a cluster in Postgres and, if `blobs.endpoint` is given, in a bucket.
        blobs: Blobs = Blobs::default();
        /// Sessions, which begin with a login.
        session: Session = Session::default();
        /// Registration and login.
        auth: Auth = Auth::default();
        /// Administrators.
        admin: Admin = Admin::default();
        /// The stop of the server.
        drain: Drain = Drain::default();
        /// Postgres, version 15 or newer: all durable state of a cluster.
        postgres: Postgres = Postgres::default();
        /// Redis, version 7.0 or newer: inboxes that are being read, leases, waiters, rate limits.
        /// All of its content may be lost.
        redis: Redis = Redis::default();
        /// NATS: messages between edges. Any of them may be lost.
        nats: Nats = Nats::default();
        /// Settings of an edge in its cluster. A cluster needs `postgres.url`, `redis.url`,
        /// `nats.url` and `cluster.secrets_dir`. Without all four the server is a single node on
        /// its data directory.
        cluster: Cluster = Cluster::default();
    }
}

section! {
    /// The certificate that clients see.
    pub struct Tls {
        /// The certificate chain, in DER or PEM.
        cert: Option<PathBuf> = None,
            unset: "`server-cert.der` in the data directory",
            variable: "QPQ_TLS_CERT", flag: "--tls-cert";
        /// The private key, in DER or PEM.
        key: Option<PathBuf> = None,
            unset: "`server-key.der` in the data directory",
            variable: "QPQ_TLS_KEY", flag: "--tls-key";
        /// The creation of a self-signed certificate and its key if neither file exists. If this
        /// section names a file that does not exist, the creation is logged as a warning.
        generate: Named<Generate> = Named(Generate::IfMissing);
        /// Names and IP addresses in a certificate that is created, in addition to the domain and
        /// `localhost`.
        names: Vec<String> = Vec::new();
        /// Interval at which the files are checked for a renewed certificate.
        reload_interval: Duration = qpq_transport::RELOAD_INTERVAL;
    }
}

section! {
    /// Limits of connections, calls and times.
    pub struct Transport {
        /// Maximum number of connections. An idle connection uses about 45 KiB.
        max_connections: usize = TransportLimits::default().max_connections;
        /// Maximum number of connections from one IP address, which many clients may share.
        max_connections_per_ip: usize = TransportLimits::default().max_connections_per_ip;
        /// Maximum number of handshakes in progress.
        max_handshakes: usize = TransportLimits::default().max_handshakes;
        /// Maximum number of handshakes in progress from one IP address (IPv6: its /64), which many
        /// clients may share.
        max_handshakes_per_ip: usize = TransportLimits::default().max_handshakes_per_ip;
        /// Number of handshakes in progress from which on clients must prove their address, which
        /// costs a round trip.
        retry_above: usize = TransportLimits::default().retry_above;
        /// Maximum number of calls in progress on one connection. Each possible call uses 83 bytes
        /// on every connection, also while no call is in progress.
        max_streams: u32 = TransportLimits::default().max_streams;
        /// Maximum time of a handshake.
        handshake_timeout: Duration = Timeouts::default().handshake;
        /// Maximum time of a handshake while at least `retry_above` handshakes are in progress.
        handshake_timeout_under_pressure: Duration = Timeouts::default().handshake_under_pressure;
        /// Time without a packet after which a connection is dropped. Clients send a keep-alive
        /// every 15 s.
        idle_timeout: Duration = Timeouts::default().idle;
        /// Maximum time for a request to arrive, from its first byte.
        request_timeout: Duration = Timeouts::default().request;
        /// Time without a packet after which messages that the client has not confirmed are back in
        /// its inbox.
        silent_peer_timeout: Duration = Timeouts::default().silent_peer;
        /// Time without progress after which an answer is aborted. A third of this time applies
        /// while the memory for answers is short.
        stalled_reply_timeout: Duration = Timeouts::default().stalled_reply;
        /// Maximum memory for requests above 4 KiB that are being received or executed.
        max_request_bytes: Size = Size(TransportLimits::default().max_request_bytes as u64);
        /// Maximum memory for requests above 4 KiB from one IP address (IPv6: its /64), which many
        /// clients may share.
        max_request_bytes_per_ip: Size =
            Size(TransportLimits::default().max_request_bytes_per_ip as u64);
        /// Maximum memory for requests above 4 KiB on one connection.
        max_request_bytes_per_connection: Size =
            Size(TransportLimits::default().max_request_bytes_per_connection as u64);
        /// Minimum rate at which a client must accept an answer, in bytes a second. The time limit
        /// of an answer is `stalled_reply_timeout` plus its length divided by this rate. Eight
        /// times this rate applies while the memory for answers is short. The messages of an
        /// aborted answer are back in the inbox.
        min_reply_rate: Size = Size(TransportLimits::default().min_reply_rate);
    }
}

section! {
    /// Memory for answers that wait for their clients.
    pub struct Answers {
        /// Maximum memory for all answers. Above three quarters of it, clients must read faster.
        process: Size = Size(AnswerMemory::default().process as u64);
        /// Maximum memory for the answers to one account, over all its connections.
        account: Size = Size(AnswerMemory::default().account as u64);
        /// Maximum memory for the answers to one connection.
        connection: Size = Size(AnswerMemory::default().connection as u64);
        /// Maximum time that a call waits for memory before it is refused.
        wait: Duration = AnswerMemory::default().wait;
    }
}

section! {
    /// Messages and inboxes.
    pub struct Delivery {
        /// The largest payload of one message.
        max_payload: Size = Size(qpq_domain::DeliveryLimits::default().max_payload as u64);
        /// Maximum number of messages queued in one inbox.
        max_messages: u64 = qpq_domain::DeliveryLimits::default().max_messages;
        /// Maximum total payload of the messages queued in one inbox.
        max_bytes: Size = Size(qpq_domain::DeliveryLimits::default().max_bytes);
        /// The divisor n of the share of one sender: while an inbox is more than half full, one
        /// sender may have at most its n-th part, in messages and in bytes. 1: no limit.
        sender_share: u64 = qpq_domain::DeliveryLimits::default().sender_share;
        /// The largest BatchEnqueue: the payload times the recipients, or the sum of the payloads.
        max_batch_bytes: Size = Size(qpq_domain::DeliveryLimits::default().max_batch_bytes);
        /// The lifetime of a message if the request has none.
        default_ttl: Duration = qpq_domain::DeliveryLimits::default().default_ttl;
        /// The longest lifetime that a request may have.
        max_ttl: Duration = qpq_domain::DeliveryLimits::default().max_ttl;
        /// Time for which a message id is kept after its message was removed, so that a repeated
        /// Enqueue is not delivered twice.
        recent_ids: Duration = qpq_domain::DeliveryLimits::default().recent_ids;
        /// A device that has not read for this time, and whose messages fill more than half of its
        /// inbox, is moved to the newest message.
        device_absence: Duration = qpq_domain::DeliveryLimits::default().device_absence;
        /// The time that FetchWait waits if the request has none.
        default_wait: Duration = qpq_domain::DeliveryLimits::default().default_wait;
        /// The longest time that FetchWait waits.
        max_wait: Duration = qpq_domain::DeliveryLimits::default().max_wait;
    }
}

section! {
    /// KeyPackages.
    pub struct Keys {
        /// The largest KeyPackage.
        max_package: Size = Size(qpq_domain::KeyPackageLimits::default().max_bytes as u64);
        /// Maximum number of KeyPackages of one account.
        max_packages: u32 = qpq_domain::KeyPackageLimits::default().max_count;
        /// The MLS ciphersuites (RFC 9420 §17.1) whose KeyPackages are accepted. KeyPackages of
        /// 0x0001 and 0x0003, the defaults, are checked in full. The signatures of KeyPackages of
        /// other suites are not checked.
        suites: Suites = Suites(qpq_rpc::Config::default().key_package_suites);
    }
}

section! {
    /// Reports to the administrators.
    pub struct Reports {
        /// Maximum number of stored reports of one account.
        max_per_account: u32 = qpq_domain::ReportLimits::default().max_per_account;
        /// Time after which a report is removed.
        max_age: Duration = qpq_domain::ReportLimits::default().max_age;
    }
}

section! {
    /// Sessions, which begin with a login.
    pub struct Session {
        /// Lifetime of a session after its last use.
        idle: Duration = SessionLifetimes::default().idle;
        /// Lifetime of a session after the login, regardless of its use.
        absolute: Duration = SessionLifetimes::default().absolute;
    }
}

section! {
    /// Registration and login.
    pub struct Auth {
        /// The people who may register: everyone, those with a code of `qpq-admin invite create`,
        /// or nobody. Edges of a release without this setting let everyone register.
        registration: Named<RegistrationMode> = Named(RegistrationMode::Open);
        /// The proof of possession of the identity key in a registration. With `optional` the
        /// proof may be missing; a proof in a request is always checked.
        identity_proof: Named<IdentityProof> = Named(IdentityProof::Optional);
        /// The scripts that a new username may mix (UTS 39 §5.2). `highly-restrictive`: only Latin
        /// with Chinese, Japanese or Korean. `moderately-restrictive`: in addition, Latin with one
        /// other script that is not Cyrillic or Greek. `any`: all scripts, and symbols. Existing
        /// accounts keep their names.
        username_scripts: Named<UsernameScripts> = Named(UsernameScripts::HighlyRestrictive);
        /// Maximum number of logins and registrations that wait for the processor. More are refused
        /// and may try again later.
        waiting_logins: usize = 256;
    }
}

section! {
    /// Administrators.
    pub struct Admin {
        /// The accounts that may call the methods of administrators: they ban accounts and read
        /// reports, and cannot be banned from the server. Such a username, and every one
        /// that looks like it, can be registered only with an invite that names it: `qpq-admin
        /// invite create --username NAME`.
        usernames: Vec<String> = Vec::new();
    }
}

section! {
    /// The stop of the server.
    pub struct Drain {
        /// Maximum time for calls in progress to end after the first SIGTERM or SIGINT. A second
        /// signal stops the server immediately.
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

/// The rule for a missing certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generate {
    IfMissing,
    Never,
}

impl Choice for Generate {
    const ALL: &'static [(&'static str, Self)] =
        &[("if_missing", Self::IfMissing), ("never", Self::Never)];
}

impl Config {
    /// Returns the configuration of the cluster's database alone, for programs other than edges.
    /// `opaque_setup` is the fingerprint that identifies the cluster.
    pub fn cluster_database(
        &self,
        opaque_setup: [u8; 32],
    ) -> Result<qpq_store_cluster::Config, PasswordFileError> {
        self.cluster_sections().database(opaque_setup, self.store_limits())
    }

    /// Returns the sections of a cluster.
    pub(crate) fn cluster_sections(&self) -> Sections<'_> {
        Sections {
            postgres: &self.postgres,
            redis: &self.redis,
            nats: &self.nats,
            cluster: &self.cluster,
            blobs: &self.blobs,
        }
    }

    /// Returns the paths of certificate and key.
    pub fn tls_files(&self) -> (PathBuf, PathBuf) {
        let place = |given: &Option<PathBuf>, name| {
            given.clone().unwrap_or_else(|| self.data_dir.join(name))
        };
        (place(&self.tls.cert, "server-cert.der"), place(&self.tls.key, "server-key.der"))
    }

    /// Returns the paths of certificate and key if both are named.
    pub(crate) fn own_tls_files(&self) -> Option<(PathBuf, PathBuf)> {
        Some((self.tls.cert.clone()?, self.tls.key.clone()?))
    }

    /// Returns the names in a certificate that is created.
    pub fn tls_names(&self) -> Vec<String> {
        certificate_names(&self.domain, &self.tls.names)
    }

    pub fn transport(&self) -> qpq_transport::Config {
        let given = &self.transport;
        qpq_transport::Config {
            listen: self.listen.0.clone(),
            alpn: Alpn::CLIENTS.to_vec(),
            client_auth: ClientAuth::None,
            limits: TransportLimits {
                max_connections: given.max_connections,
                max_connections_per_ip: given.max_connections_per_ip,
                max_handshakes: given.max_handshakes,
                max_handshakes_per_ip: given.max_handshakes_per_ip,
                retry_above: given.retry_above,
                max_streams: given.max_streams,
                max_request_bytes: bytes(given.max_request_bytes),
                max_request_bytes_per_ip: bytes(given.max_request_bytes_per_ip),
                max_request_bytes_per_connection: bytes(given.max_request_bytes_per_connection),
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
            draining: Default::default(),
        }
    }

    pub fn delivery(&self) -> qpq_domain::DeliveryLimits {
        let given = &self.delivery;
        qpq_domain::DeliveryLimits {
            max_payload: bytes(given.max_payload),
            max_messages: given.max_messages,
            max_bytes: given.max_bytes.0,
            sender_share: given.sender_share,
            max_batch_bytes: given.max_batch_bytes.0,
            default_ttl: given.default_ttl,
            max_ttl: given.max_ttl,
            recent_ids: given.recent_ids,
            device_absence: given.device_absence,
            default_wait: given.default_wait,
            max_wait: given.max_wait,
        }
    }

    pub fn key_packages(&self) -> qpq_domain::KeyPackageLimits {
        qpq_domain::KeyPackageLimits {
            max_bytes: bytes(self.keys.max_package),
            max_count: self.keys.max_packages,
        }
    }

    /// Returns the limits that the store enforces.
    pub fn store_limits(&self) -> qpq_domain::StoreLimits {
        let given = &self.blobs;
        qpq_domain::StoreLimits {
            delivery: self.delivery(),
            key_packages: self.key_packages(),
            reports: qpq_domain::ReportLimits {
                max_per_account: self.reports.max_per_account,
                max_age: self.reports.max_age,
            },
            blobs: qpq_domain::BlobLimits {
                max_bytes: given.max_bytes.0,
                quota: given.quota.0,
                max_uploads: given.max_uploads,
                max_staged: given.max_staged.0,
                upload_idle: given.upload_idle,
                lifetime: given.lifetime,
            },
        }
    }

    pub fn rpc(&self) -> qpq_rpc::Config {
        qpq_rpc::Config {
            domain: self.domain.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            sessions: SessionLifetimes { idle: self.session.idle, absolute: self.session.absolute },
            identity_proof: self.auth.identity_proof.0,
            registration: self.auth.registration.0,
            username_scripts: self.auth.username_scripts.0,
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
}

fn bytes(size: Size) -> usize {
    usize::try_from(size.0).unwrap_or(usize::MAX)
}

mod validate;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
