//! The configuration of the cluster store: the three servers, timeouts, and the limits of the
//! deployment.

use std::{fmt, fs, path::PathBuf, time::Duration};

use qpq_blob_store::BucketConfig;
use qpq_domain::{Choice, StoreLimits};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use secrecy::SecretString;

use crate::{Clocks, ConnectError, error::Server};

/// The settings for [`ClusterStore::connect`](crate::ClusterStore::connect).
#[derive(Clone, Debug)]
pub struct Config {
    /// The address and the credentials of Postgres.
    pub postgres: Endpoint,
    /// The address and the credentials of Redis.
    pub redis: Endpoint,
    /// The address and the credentials of NATS.
    pub nats: Endpoint,
    /// Maximum connections of this edge to Postgres, including those of the committers.
    pub postgres_connections: u32,
    /// The timeout of a statement, of the wait for a lock, and of the wait for a connection.
    pub postgres_timeout: Duration,
    /// The timeout of a connection to Redis and of each answer.
    pub redis_timeout: Duration,
    /// The timeout of the first connection to each server.
    pub start_timeout: Duration,
    /// The prefix of every key in Redis and every subject in NATS, so that clusters can share both.
    pub namespace: String,
    /// The policy for schema migrations. An edge that does not migrate needs an up-to-date schema.
    pub migrate: Migrate,
    /// The fingerprint of the cluster's OPAQUE setup. The first edge stores its fingerprint, and
    /// all others must have the same one.
    pub opaque_setup: [u8; 32],
    /// The limits of the deployment.
    pub limits: StoreLimits,
    /// The intervals by which edges detect each other's changes.
    pub timing: Timing,
    /// The clocks of the edge.
    pub clocks: Clocks,
    /// The places of the bytes of blobs.
    pub blobs: BlobPlaces,
}

/// The places of the bytes of blobs. Chunks of uploads are in Postgres in any case.
#[derive(Clone, Debug)]
pub struct BlobPlaces {
    /// The bucket for blobs that are larger than `small`.
    pub bucket: Option<BucketConfig>,
    /// The size of the largest blob that stays in Postgres although there is a bucket.
    pub small: u64,
    /// The size of the largest blob without a bucket.
    pub max_without_bucket: u64,
}

impl Default for BlobPlaces {
    fn default() -> Self {
        Self { bucket: None, small: 64 << 10, max_without_bucket: 16 << 20 }
    }
}

/// The address and the credentials of one server.
#[derive(Clone)]
pub struct Endpoint {
    /// The URL: `postgres://`; `redis://`, `rediss://`, `redis+cluster://a,b,c`,
    /// `redis+sentinel://a,b/primary` (`rediss+…` with TLS); `nats://` or `tls://`, several
    /// separated by commas. May contain user and password.
    pub url: String,
    /// The password. Takes precedence over the one in the URL.
    pub password: Option<SecretString>,
    /// A PEM file with the certificate authorities that the server's certificate is checked
    /// against: for Redis and NATS in place of the system's authorities, for Postgres in addition
    /// to the public ones.
    pub ca: Option<PathBuf>,
}

impl Endpoint {
    /// Returns the contents of the file `ca`. A file without a certificate is an error, because a
    /// client library may ignore it.
    pub(crate) fn authorities(&self, server: Server) -> Result<Option<Vec<u8>>, ConnectError> {
        let Some(path) = &self.ca else { return Ok(None) };
        let unusable =
            |cause: String| ConnectError::File { setting: server.ca(), path: path.clone(), cause };
        let pem = fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
        if roots.is_empty() {
            Err(unusable("there is no certificate in it".into()))
        } else {
            Ok(Some(pem))
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("ca", &self.ca).finish_non_exhaustive()
    }
}

/// The policy for schema migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrate {
    /// Each edge migrates the schema when it starts.
    AtStart,
    /// Only `qpq-admin migrate` migrates the schema.
    Never,
}

impl Choice for Migrate {
    const ALL: &'static [(&'static str, Self)] =
        &[("never", Self::Never), ("at_start", Self::AtStart)];
}

/// The intervals by which edges detect each other's changes without a message.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Average time between two polls of the inboxes that calls wait for. A poll finds a message
    /// whose wake was lost.
    pub poll: Duration,
    /// Time after which the leases of a killed edge expire.
    pub lease: Duration,
    /// Time for which the copies of a session, in an edge and in Redis, are valid. While NATS is
    /// down, a revocation takes effect after at most this time.
    pub session_cache: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            poll: Duration::from_secs(5),
            lease: Duration::from_secs(10),
            session_cache: Duration::from_secs(15),
        }
    }
}
