//! The settings that make an edge one of a cluster. All three servers and the directory of shared
//! secrets → a cluster; none of them → the embedded store; some of them → refused, with the missing
//! names.

use std::{fs, path::PathBuf, time::Duration};

use qpq_domain::{Delivery, KeyPackageCaps};
use qpq_runtime::{
    Redacted,
    config::{Broken, Choice},
    section,
};
use qpq_store_cluster::{Clocks, Endpoint, Limits, Migrate, Timing};

section! {
    /// Postgres, version 15 or newer, where a cluster keeps everything that is durable.
    pub struct Postgres {
        /// Where it is, as in `postgres://qpq@db.example.org:5432/qpq`. Several hosts' addresses
        /// are for a proxy to hide.
        url: Option<Redacted<String>> = None;
        /// A file with the password, which then need not be in the URL.
        password_file: Option<PathBuf> = None;
        /// A PEM file with the authorities of its certificate, beside the public ones; the
        /// connection is encrypted and the certificate checked.
        ca: Option<PathBuf> = None, unset: "the URL's `sslmode` decides";
        /// Connections of this edge at most.
        connections: u32 = 16;
        /// How long a statement may take, a lock be waited for, and a free connection be waited
        /// for.
        timeout: Duration = Duration::from_secs(5);
    }
}

section! {
    /// Redis, version 7.0 or newer: queues that are being read, leases, waiters, rate limits. It
    /// may lose everything it holds.
    pub struct Redis {
        /// Where it is: `redis://host:6379`, `redis+cluster://a:6379,b:6379` or
        /// `redis+sentinel://a:26379,b:26379/primary`; with `rediss` in place of `redis` encrypted.
        /// Sentinels may want the password too, or none.
        url: Option<Redacted<String>> = None;
        /// A file with the password, which then need not be in the URL.
        password_file: Option<PathBuf> = None;
        /// A PEM file with the authorities of its certificate; only where the URL says `rediss`.
        ca: Option<PathBuf> = None, unset: "the system's";
        /// How long it may take to answer.
        timeout: Duration = Duration::from_secs(2);
    }
}

section! {
    /// NATS: word from edge to edge. All of it may get lost.
    pub struct Nats {
        /// Where it is, as in `nats://a:4222,nats://b:4222` or `nats://user:password@a`; with `tls`
        /// in place of `nats` encrypted. One word in front of `@` is a token.
        url: Option<Redacted<String>> = None;
        /// A file with the password, or with the token where the URL names no user.
        password_file: Option<PathBuf> = None;
        /// A PEM file with the authorities of its certificate; the connection is encrypted.
        ca: Option<PathBuf> = None, unset: "the system's";
    }
}

section! {
    /// What this edge shares with the others of its cluster.
    pub struct Cluster {
        /// The directory that `qpq-admin init` made, the same for every edge: secrets, keys, the
        /// certificate.
        secrets_dir: Option<PathBuf> = None;
        /// This edge's name, which no other running edge has. One that is started again under its
        /// name can tell the clients of its predecessor at once that their connections are gone.
        edge: Option<String> = None, unset: "clients event it by silence";
        /// In front of every key in Redis and every subject in NATS, where several clusters share
        /// those.
        namespace: String = "qpq".into();
        /// Whether an edge brings the schema up to date when it starts. Else `qpq-admin migrate`
        /// does, before.
        migrate: MigrateWhen = MigrateWhen::Never;
        /// Maximum difference between the clocks of this edge and of Postgres. Beyond it the edge is
        /// not ready.
        max_clock_skew: Duration = Clocks::default().max_skew;
        /// How long an edge that starts waits for each of the servers, be it that it is not there
        /// or that it hangs. One that refuses the edge is not waited for.
        start_timeout: Duration = Duration::from_secs(60);
        /// Between two looks at the inboxes that somebody waits for: the delay of a message when
        /// word of it got lost.
        poll: Duration = Timing::default().poll;
        /// How long messages that an edge was delivering stay hidden when it dies.
        lease: Duration = Timing::default().lease;
        /// How long an edge and Redis may each believe in a session: how long an end of it can go
        /// unnoticed while NATS is away.
        session_cache: Duration = Timing::default().session_cache;
    }
}

/// When the schema is brought up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrateWhen {
    Never,
    AtStart,
}

impl Choice for MigrateWhen {
    const ALL: &'static [(&'static str, Self)] =
        &[("never", Self::Never), ("at_start", Self::AtStart)];
}

/// The four sections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sections<'a> {
    pub(crate) postgres: &'a Postgres,
    pub(crate) redis: &'a Redis,
    pub(crate) nats: &'a Nats,
    pub(crate) cluster: &'a Cluster,
}

/// A file named in the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path} that {setting} names cannot be read: {source}", path = path.display())]
pub struct PasswordFileError {
    setting: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

impl<'a> Sections<'a> {
    /// The directory of shared secrets, if this edge is one of a cluster.
    pub(crate) fn secrets_dir(&self) -> Option<&'a PathBuf> {
        self.cluster.secrets_dir.as_ref().filter(|_| self.missing().is_empty())
    }

    /// What is missing for a cluster, if only some of it is given.
    pub(crate) fn broken(&self) -> Option<Broken> {
        let missing = self.missing();
        let &first = missing.first()?;
        (missing.len() < NEEDED).then(|| Broken {
            path: first,
            must_be: format!(
                "given too: a cluster needs postgres.url, redis.url, nats.url and cluster.secrets_dir, and {} {} missing. \
                 Without any of the four the server runs alone",
                missing.join(" and "),
                if missing.len() == 1 { "is" } else { "are" }
            ),
        })
    }

    fn missing(&self) -> Vec<&'static str> {
        let given = [
            ("postgres.url", self.postgres.url.is_some()),
            ("redis.url", self.redis.url.is_some()),
            ("nats.url", self.nats.url.is_some()),
            ("cluster.secrets_dir", self.cluster.secrets_dir.is_some()),
        ];
        given.into_iter().filter(|(_, given)| !given).map(|(name, _)| name).collect()
    }

    /// What the store wants.
    pub(crate) fn store(
        &self,
        opaque_setup: [u8; 32],
        delivery: Delivery,
        key_packages: KeyPackageCaps,
    ) -> Result<qpq_store_cluster::Config, PasswordFileError> {
        let Self { redis, nats, .. } = self;
        Ok(qpq_store_cluster::Config {
            redis: endpoint(&redis.url, "redis.password_file", &redis.password_file, &redis.ca)?,
            nats: endpoint(&nats.url, "nats.password_file", &nats.password_file, &nats.ca)?,
            ..self.database(opaque_setup, delivery, key_packages)?
        })
    }

    /// What Postgres alone needs; the other two are nowhere, and their passwords are not looked
    /// for.
    pub(crate) fn database(
        &self,
        opaque_setup: [u8; 32],
        delivery: Delivery,
        key_packages: KeyPackageCaps,
    ) -> Result<qpq_store_cluster::Config, PasswordFileError> {
        let Self { postgres, redis, cluster, .. } = self;
        let nowhere = || Endpoint { url: String::new(), password: None, ca: None };
        Ok(qpq_store_cluster::Config {
            postgres: endpoint(
                &postgres.url,
                "postgres.password_file",
                &postgres.password_file,
                &postgres.ca,
            )?,
            redis: nowhere(),
            nats: nowhere(),
            postgres_connections: postgres.connections,
            postgres_timeout: postgres.timeout,
            redis_timeout: redis.timeout,
            start_timeout: cluster.start_timeout,
            namespace: cluster.namespace.clone(),
            migrate: match cluster.migrate {
                MigrateWhen::Never => Migrate::Never,
                MigrateWhen::AtStart => Migrate::AtStart,
            },
            opaque_setup,
            limits: Limits { delivery, key_packages },
            timing: Timing {
                poll: cluster.poll,
                lease: cluster.lease,
                session_cache: cluster.session_cache,
            },
            clocks: Clocks { max_skew: cluster.max_clock_skew, ..Clocks::default() },
        })
    }
}

/// How many settings make a cluster.
const NEEDED: usize = 4;

fn endpoint(
    url: &Option<Redacted<String>>,
    setting: &'static str,
    password_file: &Option<PathBuf>,
    ca: &Option<PathBuf>,
) -> Result<Endpoint, PasswordFileError> {
    let read = |path: &PathBuf| {
        fs::read_to_string(path)
            .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
            .map_err(|source| PasswordFileError { setting, path: path.clone(), source })
    };
    Ok(Endpoint {
        url: url.as_ref().map(|url| url.reveal().clone()).unwrap_or_default(),
        password: password_file.as_ref().map(read).transpose()?,
        ca: ca.clone(),
    })
}
