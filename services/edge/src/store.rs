//! Where this server keeps its state: in its own directory, or in the cluster's servers.

use std::{path::PathBuf, sync::Arc};

use qpq_ports::{Clock, Stores, SystemClock};
use qpq_runtime::data_dir::DataDir;
use qpq_store_cluster::ClusterStore;
use qpq_store_embedded::{EmbeddedStore, OpenError, RESTORING_FILE};
use qpq_transport::{Certificates, Member};

use crate::{
    Config, StartError,
    certificate::{self, CertificateError},
    secrets::{self, Secrets},
};

/// An open store.
#[derive(Debug)]
pub(crate) enum Store {
    Embedded(EmbeddedStore),
    Cluster(ClusterStore),
}

/// A store and what belongs to it.
pub(crate) struct Opened {
    pub(crate) store: Store,
    pub(crate) secrets: Secrets,
    pub(crate) certificates: Arc<Certificates>,
    /// Where a certificate was created although the configuration names one.
    pub(crate) certificate_created: Option<PathBuf>,
    /// The edge's place in its cluster.
    pub(crate) member: Option<Member>,
}

impl Store {
    /// The cluster's, if the configuration names one; else the embedded one, made if missing.
    pub(crate) async fn open(config: &Config) -> Result<Opened, StartError> {
        match config.cluster_sections().secrets_dir() {
            Some(_) => Box::pin(Self::cluster(config)).await,
            None => Box::pin(Self::embedded(config)).await,
        }
    }

    async fn embedded(config: &Config) -> Result<Opened, StartError> {
        let dir = DataDir::create(&config.data_dir)?;
        // Before anything is created there.
        if dir.path().join(RESTORING_FILE).exists() {
            return Err(OpenError::Restoring(dir.path().to_owned()).into());
        }
        let secrets = secrets::load_or_create(&dir)?;
        let limits = qpq_store_embedded::Limits {
            delivery: config.delivery(),
            key_packages: config.key_packages(),
        };
        let store = EmbeddedStore::open(dir.path(), limits).await?;
        match certificate::open(config) {
            Ok(opened) => Ok(Opened {
                store: Self::Embedded(store),
                secrets,
                certificates: opened.certificates,
                certificate_created: opened.created_at,
                member: None,
            }),
            Err(error) => {
                // So that the next attempt, perhaps from this process, finds the directory free.
                store.close().await;
                Err(error.into())
            }
        }
    }

    async fn cluster(config: &Config) -> Result<Opened, StartError> {
        let sections = config.cluster_sections();
        let fleet = secrets::load_fleet(sections.secrets_dir().expect("it is a cluster"))?;
        let certificates = match config.own_tls_files() {
            Some((cert, key)) => Certificates::load(&cert, &key).map_err(CertificateError::from)?,
            None => fleet.certificates,
        };
        let store =
            sections.store(fleet.opaque_fingerprint, config.delivery(), config.key_packages())?;
        let store = ClusterStore::connect(&store).await?;
        tracing::info!(cluster = %fleet.cluster, "this edge is one of a cluster");
        let member = Member { keys: fleet.keys, edge: config.cluster.edge.clone() };
        Ok(Opened {
            store: Self::Cluster(store),
            secrets: fleet.secrets,
            certificates,
            certificate_created: None,
            member: Some(member),
        })
    }

    /// The ports.
    pub(crate) fn stores(&self) -> Stores {
        match self {
            Self::Embedded(store) => store.stores(),
            Self::Cluster(store) => store.stores(),
        }
    }

    /// The time that the ports are given: Postgres' in a cluster, else this machine's.
    pub(crate) fn clock(&self) -> Arc<dyn Clock> {
        match self {
            Self::Embedded(_) => Arc::new(SystemClock),
            Self::Cluster(store) => store.clock(),
        }
    }

    /// Lets go of whatever it holds.
    pub(crate) async fn close(self) {
        match self {
            Self::Embedded(store) => store.close().await,
            Self::Cluster(store) => store.close().await,
        }
    }
}
