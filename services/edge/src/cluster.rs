//! The settings that make an edge one of a cluster. With all three servers and the directory of
//! shared secrets, the server is an edge. Without all four, it uses the embedded store. With some
//! of them, it refuses to start and names the missing ones.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use qpq_domain::{BlobLimits, StoreLimits};
use qpq_runtime::{
    config::{Broken, Named, Size},
    section,
};
use qpq_store_cluster::{BlobPlaces, BucketConfig, Clocks, Endpoint, Migrate, Timing};
use secrecy::{ExposeSecret as _, SecretString};

section! {
    /// Postgres, version 15 or newer: all durable state of a cluster.
    pub struct Postgres {
        /// The address, as in `postgres://qpq@db.example.org:5432/qpq`. For several hosts use the
        /// address of a proxy.
        url: Option<SecretString> = None;
        /// A file with the password, instead of the password in the URL.
        password_file: Option<PathBuf> = None;
        /// A PEM file with authorities to trust in addition to the public ones. The connection is
        /// encrypted and the certificate checked.
        ca: Option<PathBuf> = None, unset: "the URL's `sslmode` decides";
        /// Maximum number of connections of this edge.
        connections: u32 = 16;
        /// Maximum time of a statement, of a wait for a lock, and of a wait for a free connection.
        timeout: Duration = Duration::from_secs(5);
    }
}

section! {
    /// Redis, version 7.0 or newer: inboxes that are being read, leases, waiters, rate limits. All
    /// of its content may be lost.
    pub struct Redis {
        /// The address: `redis://host:6379`, `redis+cluster://a:6379,b:6379` or
        /// `redis+sentinel://a:26379,b:26379/primary`. `rediss` instead of `redis` encrypts.
        /// Sentinels may have the same password, or none.
        url: Option<SecretString> = None;
        /// A file with the password, instead of the password in the URL.
        password_file: Option<PathBuf> = None;
        /// A PEM file with the authorities to trust. Only with `rediss` in the URL.
        ca: Option<PathBuf> = None, unset: "the authorities of the system";
        /// Maximum time of an operation.
        timeout: Duration = Duration::from_secs(2);
    }
}

section! {
    /// NATS: messages between edges. Any of them may be lost.
    pub struct Nats {
        /// The address, as in `nats://a:4222,nats://b:4222` or `nats://user:password@a`. `tls`
        /// instead of `nats` encrypts. Text without a colon in front of `@` is a token.
        url: Option<SecretString> = None;
        /// A file with the password, or with the token if the URL names no user.
        password_file: Option<PathBuf> = None;
        /// A PEM file with the authorities to trust. The connection is encrypted.
        ca: Option<PathBuf> = None, unset: "the authorities of the system";
    }
}

section! {
    /// Blobs, the encrypted files of messages.
    pub struct Blobs {
        /// The largest blob.
        max_bytes: Size = Size(BlobLimits::default().max_bytes);
        /// Maximum total size of the blobs and open uploads of one account.
        quota: Size = Size(BlobLimits::default().quota);
        /// Maximum number of open uploads of one account.
        max_uploads: u32 = BlobLimits::default().max_uploads;
        /// Maximum total size of the open uploads of one account.
        max_staged: Size = Size(BlobLimits::default().max_staged);
        /// Time without a chunk after which an upload is removed.
        upload_idle: Duration = BlobLimits::default().upload_idle;
        /// Time after which a blob is removed from an account that has not renewed it.
        lifetime: Duration = BlobLimits::default().lifetime;
        /// The URL of an object store that speaks the S3 protocol, as in
        /// `https://s3.example.org`. Only for a cluster. Each edge needs the same bucket.
        endpoint: Option<String> = None, unset: "none: blobs stay in Postgres";
        /// The bucket, which must exist.
        bucket: String = "qpq".into();
        /// The region of the bucket.
        region: String = "us-east-1".into();
        /// A file with the id of the access key.
        access_key_file: Option<PathBuf> = None;
        /// A file with the secret of the access key.
        secret_key_file: Option<PathBuf> = None;
        /// A PEM file with authorities to trust in addition to those of the system.
        ca: Option<PathBuf> = None;
        /// Maximum time of one request to the object store.
        timeout: Duration = Duration::from_secs(40);
        /// The size of the largest blob that stays in Postgres although there is a bucket.
        max_bytes_in_postgres: Size = Size(BlobPlaces::default().small);
        /// The largest blob of a cluster without a bucket. Larger blobs are refused.
        max_bytes_without_bucket: Size = Size(BlobPlaces::default().max_without_bucket);
    }
}

section! {
    /// Settings of an edge in its cluster.
    pub struct Cluster {
        /// The directory that `qpq-admin init` created, with the same content for every edge:
        /// secrets, keys, the certificate.
        secrets_dir: Option<PathBuf> = None;
        /// The name of this edge, unique among the running edges. An edge that is restarted under
        /// the same name can immediately notify the clients of its predecessor that their
        /// connections have ended.
        edge: Option<String> = None, unset: "none: connections of a killed edge time out";
        /// The prefix of every key in Redis and every subject in NATS, for several clusters that
        /// share those servers.
        namespace: String = "qpq".into();
        /// The migration of the schema at the start of an edge. With `never`, run `qpq-admin
        /// migrate` before edges of a new version start.
        migrate: Named<Migrate> = Named(Migrate::Never);
        /// Maximum difference between the clocks of this edge and of Postgres. With a larger one
        /// the edge is not ready.
        max_clock_skew: Duration = Clocks::default().max_skew;
        /// Maximum time that a starting edge waits for each server that cannot be reached or does
        /// not answer. A server that refuses the edge ends the start immediately.
        start_timeout: Duration = Duration::from_secs(60);
        /// Interval between two checks of the inboxes with waiting calls: the maximum delay of a
        /// message whose wake was lost.
        poll: Duration = Timing::default().poll;
        /// Maximum time for which messages that a killed edge was delivering stay hidden.
        lease: Duration = Timing::default().lease;
        /// Time for which an edge and Redis each cache a session: the maximum time for which the
        /// end of a session goes unnoticed while NATS is unavailable.
        session_cache: Duration = Timing::default().session_cache;
        /// Interval at which one of the edges rotates the keys of TLS session tickets in
        /// `secrets_dir`. Only for edges that all read one directory, and may write to it. Where
        /// each edge has a copy, or the directory is a Secret of Kubernetes, run `qpq-admin
        /// rotate-ticket-keys` every 6 hours instead.
        rotate_ticket_keys: Option<Duration> = None, unset: "none: the edges rotate no keys";
    }
}

/// The sections of an edge.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sections<'a> {
    pub(crate) postgres: &'a Postgres,
    pub(crate) redis: &'a Redis,
    pub(crate) nats: &'a Nats,
    pub(crate) cluster: &'a Cluster,
    pub(crate) blobs: &'a Blobs,
}

/// The reason why a file named in the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}, which {setting} names, cannot be read: {source}", path = path.display())]
pub struct PasswordFileError {
    setting: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

impl<'a> Sections<'a> {
    /// Returns the directory of shared secrets if this server is an edge.
    pub(crate) fn secrets_dir(&self) -> Option<&'a PathBuf> {
        self.cluster.secrets_dir.as_ref().filter(|_| self.missing().is_empty())
    }

    /// Returns the missing settings of a cluster, if some of them are given.
    pub(crate) fn broken(&self) -> Option<Broken> {
        let missing = self.missing();
        let &first = missing.first()?;
        (missing.len() < NEEDED).then(|| Broken {
            path: first,
            must_be: format!(
                "given too: a cluster needs postgres.url, redis.url, nats.url and \
                 cluster.secrets_dir, and {} {} missing. Without any of the four the server is a \
                 single node",
                missing.join(" and "),
                if missing.len() == 1 { "is" } else { "are" }
            ),
        })
    }

    /// Returns whether no setting makes this server an edge.
    pub(crate) fn is_single_node(&self) -> bool {
        self.missing().len() == NEEDED
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

    /// Returns the configuration of the store.
    pub(crate) fn store(
        &self,
        opaque_setup: [u8; 32],
        limits: StoreLimits,
    ) -> Result<qpq_store_cluster::Config, PasswordFileError> {
        let Self { redis, nats, .. } = self;
        Ok(qpq_store_cluster::Config {
            redis: endpoint(&redis.url, "redis.password_file", &redis.password_file, &redis.ca)?,
            nats: endpoint(&nats.url, "nats.password_file", &nats.password_file, &nats.ca)?,
            blobs: self.blobs.places()?,
            ..self.database(opaque_setup, limits)?
        })
    }

    /// Returns a configuration for Postgres alone. Redis, NATS and the bucket have no address in
    /// it, and their password files are not read.
    pub(crate) fn database(
        &self,
        opaque_setup: [u8; 32],
        limits: StoreLimits,
    ) -> Result<qpq_store_cluster::Config, PasswordFileError> {
        let Self { postgres, redis, cluster, .. } = self;
        let none = || Endpoint { url: String::new(), password: None, ca: None };
        Ok(qpq_store_cluster::Config {
            postgres: endpoint(
                &postgres.url,
                "postgres.password_file",
                &postgres.password_file,
                &postgres.ca,
            )?,
            redis: none(),
            nats: none(),
            postgres_connections: postgres.connections,
            postgres_timeout: postgres.timeout,
            redis_timeout: redis.timeout,
            start_timeout: cluster.start_timeout,
            namespace: cluster.namespace.clone(),
            migrate: cluster.migrate.0,
            opaque_setup,
            limits,
            timing: Timing {
                poll: cluster.poll,
                lease: cluster.lease,
                session_cache: cluster.session_cache,
            },
            clocks: Clocks { max_skew: cluster.max_clock_skew, ..Clocks::default() },
            blobs: BlobPlaces::default(),
        })
    }
}

/// The number of settings that make a cluster.
const NEEDED: usize = 4;

impl Blobs {
    /// Returns the first setting that a bucket needs in addition to those that are given.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        let given = [
            ("blobs.endpoint", self.endpoint.is_some()),
            ("blobs.access_key_file", self.access_key_file.is_some()),
            ("blobs.secret_key_file", self.secret_key_file.is_some()),
        ];
        let is_any = given.iter().any(|(_, given)| *given);
        let missing = given.into_iter().find(|(_, given)| !given && is_any);
        missing.map(|(setting, _)| setting)
    }

    fn places(&self) -> Result<BlobPlaces, PasswordFileError> {
        let key = |setting, path: &Option<PathBuf>| {
            path.as_deref().map(|path| secret(setting, path)).transpose()
        };
        let keys = (
            key("blobs.access_key_file", &self.access_key_file)?,
            key("blobs.secret_key_file", &self.secret_key_file)?,
        );
        let bucket = match (&self.endpoint, keys) {
            (Some(endpoint), (Some(access_key), Some(secret_key))) => Some(BucketConfig {
                endpoint: endpoint.clone(),
                bucket: self.bucket.clone(),
                region: self.region.clone(),
                access_key,
                secret_key,
                ca: self.ca.clone(),
                timeout: self.timeout,
            }),
            _ => None,
        };
        Ok(BlobPlaces {
            bucket,
            small: self.max_bytes_in_postgres.0,
            max_without_bucket: self.max_bytes_without_bucket.0,
        })
    }
}

/// Reads a file with one secret.
fn secret(setting: &'static str, path: &Path) -> Result<SecretString, PasswordFileError> {
    fs::read_to_string(path)
        .map(|text| SecretString::from(text.trim_end_matches(['\r', '\n'])))
        .map_err(|source| PasswordFileError { setting, path: path.to_owned(), source })
}

fn endpoint(
    url: &Option<SecretString>,
    setting: &'static str,
    password_file: &Option<PathBuf>,
    ca: &Option<PathBuf>,
) -> Result<Endpoint, PasswordFileError> {
    Ok(Endpoint {
        url: url.as_ref().map(|url| url.expose_secret().to_owned()).unwrap_or_default(),
        password: password_file.as_deref().map(|path| secret(setting, path)).transpose()?,
        ca: ca.clone(),
    })
}
