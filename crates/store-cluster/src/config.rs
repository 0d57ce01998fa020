//! The configuration of the cluster store: the three servers, timeouts, and the limits of the
//! deployment.

use std::{fmt, fs, path::PathBuf, time::Duration};

use qpq_domain::{Choice, StoreLimits};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use secrecy::SecretString;

use crate::{Clocks, ConnectError, error::Server};

/// Everything [`ClusterStore::connect`](crate::ClusterStore::connect) needs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Postgres.
    pub postgres: Endpoint,
    /// Redis.
    pub redis: Endpoint,
    /// NATS.
    pub nats: Endpoint,
    /// Connections of this edge to Postgres. The committers use some of them.
    pub postgres_connections: u32,
    /// Timeout of one statement, of one lock and of one connection.
    pub postgres_timeout: Duration,
    /// Timeout of an answer of Redis.
    pub redis_timeout: Duration,
    /// Timeout of the first connection to each server.
    pub start_timeout: Duration,
    /// The prefix of every key in Redis and every subject in NATS, so that clusters can share both.
    pub namespace: String,
    /// Whether the schema is migrated at the start. Otherwise it must be up to date.
    pub migrate: Migrate,
    /// The fingerprint of the cluster's OPAQUE setup. The first edge stores it, and all others must
    /// have the same.
    pub opaque_setup: [u8; 32],
    /// The limits of the deployment.
    pub limits: StoreLimits,
    /// Intervals between edges.
    pub timing: Timing,
    /// The clocks of the edge.
    pub clocks: Clocks,
}

/// The address and the credentials of one server.
#[derive(Clone)]
pub struct Endpoint {
    /// `postgres://`; `redis://`, `rediss://`, `redis+cluster://a,b,c`,
    /// `redis+sentinel://a,b/primary` (`rediss+…` with TLS); `nats://`, `tls://`, several separated
    /// by commas. May contain user and password.
    pub url: String,
    /// Replaces the password in the URL.
    pub password: Option<SecretString>,
    /// PEM file with the authorities of the server's certificate: for Redis and NATS instead of the
    /// system's, for Postgres in addition to the public ones.
    pub ca: Option<PathBuf>,
}

impl Endpoint {
    /// Returns the contents of the file `ca`, which must have a certificate: a client library may
    /// ignore a file without any.
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

/// Whether the schema is migrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrate {
    /// Whenever an edge starts.
    AtStart,
    /// The schema is updated by `qpq-admin migrate` only.
    Never,
}

impl Choice for Migrate {
    const ALL: &'static [(&'static str, Self)] =
        &[("never", Self::Never), ("at_start", Self::AtStart)];
}

/// The intervals by which edges detect each other's changes without a message.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Time between two polls of the inboxes with waiting calls: the delay of a message whose wake
    /// was lost.
    pub poll: Duration,
    /// Time for which a lease outlives its edge.
    pub lease: Duration,
    /// Time for which copies of a session in this edge and in Redis are valid: the delay of a
    /// revocation while NATS is down.
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
