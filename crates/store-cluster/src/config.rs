//! What the cluster store is given: where its three servers are, how long to wait for them, what
//! the deployment allows.

use std::{fmt, fs, path::PathBuf, time::Duration};

use qpq_domain::{Delivery, KeyPackageCaps};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use crate::{Clocks, ConnectError, error::Server};

/// Everything [`ClusterStore::connect`](crate::ClusterStore::connect) needs.
#[derive(Clone, Debug)]
pub struct Config {
    pub postgres: Endpoint,
    pub redis: Endpoint,
    pub nats: Endpoint,
    /// Connections to Postgres, of this edge. A few of them are the committers'.
    pub postgres_connections: u32,
    /// How long one statement may take, one lock be waited for, one connection be waited for.
    pub postgres_timeout: Duration,
    /// How long Redis may take to answer.
    pub redis_timeout: Duration,
    /// How long each of the servers is waited for at the start, before that is an error.
    pub start_timeout: Duration,
    /// In front of every key in Redis and every subject in NATS, so that several clusters can share
    /// those.
    pub namespace: String,
    /// Whether the schema is brought up to date at the start. Else it must be already.
    pub migrate: Migrate,
    /// What identifies the cluster's OPAQUE setup; the first edge writes it down, all others must
    /// have the same.
    pub opaque_setup: [u8; 32],
    pub limits: Limits,
    pub timing: Timing,
    pub clocks: Clocks,
}

/// Where one server is, and how to be let in.
#[derive(Clone)]
pub struct Endpoint {
    /// `postgres://`; `redis://`, `rediss://`, `redis+cluster://a,b,c`,
    /// `redis+sentinel://a,b/primary` (`rediss+…` with TLS); `nats://`, `tls://`, several separated
    /// by commas. User and password may be in it.
    pub url: String,
    /// In place of the one in the URL.
    pub password: Option<String>,
    /// PEM file with the certificates that the server's must come from: for Redis and NATS in place
    /// of the system's, for Postgres beside the public ones.
    pub ca: Option<PathBuf>,
}

impl Endpoint {
    /// What is in the file of `ca`, once it is known to be of use: a client library may take one
    /// without certificates for none.
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

/// Whether to bring the schema up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrate {
    AtStart,
    Never,
}

/// What the deployment allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    pub delivery: Delivery,
    pub key_packages: KeyPackageCaps,
}

/// How quickly the edges notice each other's doings when nobody tells them.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two looks at the inboxes that somebody waits for: the delay of a message whose wake
    /// was lost.
    pub poll: Duration,
    /// How long a lease outlives the edge that took it.
    pub lease: Duration,
    /// How long this edge, and how long Redis, may believe in a session without asking further: how
    /// long a revocation can go unnoticed while NATS is down.
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
