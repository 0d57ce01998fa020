//! The store of this server: its own directory, or the servers of the cluster.

use std::{path::PathBuf, sync::Arc};

use qpq_ports::{Clock, Stores, SystemClock};
use qpq_rpc::AtRestKeys;
use qpq_runtime::data_dir::DataDir;
use qpq_store_cluster::ClusterStore;
use qpq_store_embedded::{EmbeddedStore, OpenError, RESTORING_FILE};
use qpq_transport::{Certificates, ClusterEdge};

use crate::{
    Config, StartError, at_rest,
    certificate::{self, CertificateError},
    secrets::{self, Secrets},
};

/// An open store.
#[derive(Debug)]
pub(crate) enum Store {
    Embedded(Box<EmbeddedStore>),
    Cluster(ClusterStore),
}

/// An open store, and the secrets and the certificate that belong to it.
pub(crate) struct Opened {
    pub(crate) store: Store,
    pub(crate) secrets: Secrets,
    pub(crate) at_rest: AtRestKeys,
    pub(crate) certificates: Arc<Certificates>,
    /// The path of a certificate that was created although the configuration names a file.
    pub(crate) certificate_created: Option<PathBuf>,
    /// This edge, if the server is one of a cluster.
    pub(crate) edge: Option<ClusterEdge>,
}

impl Store {
    /// Opens the store of the cluster if the configuration names one, otherwise the embedded store,
    /// which is created if missing.
    pub(crate) async fn open(config: &Config) -> Result<Opened, StartError> {
        match config.cluster_sections().secrets_dir() {
            Some(_) => Box::pin(Self::cluster(config)).await,
            None => Box::pin(Self::embedded(config)).await,
        }
    }

    async fn embedded(config: &Config) -> Result<Opened, StartError> {
        let dir = DataDir::create(&config.data_dir)?;
        // Nothing may be created in a directory that is being restored.
        if dir.path().join(RESTORING_FILE).exists() {
            return Err(OpenError::Restoring(dir.path().to_owned()).into());
        }
        let secrets = secrets::load_or_create(&dir)?;
        let store = EmbeddedStore::open(dir.path(), config.store_limits()).await?;
        let opened = async {
            let bundles = store.stores().recovery_bundles;
            let at_rest = at_rest::load_or_create(&dir, &*bundles).await?;
            Ok((at_rest, certificate::open(config)?))
        };
        match opened.await {
            Ok((at_rest, opened)) => Ok(Opened {
                store: Self::Embedded(Box::new(store)),
                secrets,
                at_rest,
                certificates: opened.certificates,
                certificate_created: opened.created_at,
                edge: None,
            }),
            Err(error) => {
                // The next attempt, maybe in this process, needs the lock of the directory.
                store.close().await;
                Err(error)
            }
        }
    }

    async fn cluster(config: &Config) -> Result<Opened, StartError> {
        let sections = config.cluster_sections();
        let dir = sections.secrets_dir().expect("it is a cluster");
        let shared = secrets::load_shared(dir)?;
        let at_rest = at_rest::load_shared(dir)?;
        let certificates = match config.own_tls_files() {
            Some((cert, key)) => Certificates::load(&cert, &key).map_err(CertificateError::from)?,
            None => shared.certificates,
        };
        let store = sections.store(shared.opaque_fingerprint, config.store_limits())?;
        let store = ClusterStore::connect(&store).await?;
        let bundles = store.stores().recovery_bundles;
        let at_rest = match at_rest::check_shared(at_rest, dir, &*bundles).await {
            Ok(at_rest) => at_rest,
            Err(error) => {
                store.close().await;
                return Err(error.into());
            }
        };
        tracing::info!(cluster = %shared.cluster, "edge joined its cluster");
        let edge = ClusterEdge { keys: shared.keys, name: config.cluster.edge.clone() };
        Ok(Opened {
            store: Self::Cluster(store),
            secrets: shared.secrets,
            at_rest,
            certificates,
            certificate_created: None,
            edge: Some(edge),
        })
    }

    /// Returns the ports.
    pub(crate) fn stores(&self) -> Stores {
        match self {
            Self::Embedded(store) => store.stores(),
            Self::Cluster(store) => store.stores(),
        }
    }

    /// Returns the clock for calls of the ports: that of Postgres in a cluster, otherwise that of
    /// this machine.
    pub(crate) fn clock(&self) -> Arc<dyn Clock> {
        match self {
            Self::Embedded(_) => Arc::new(SystemClock),
            Self::Cluster(store) => store.clock(),
        }
    }

    /// Closes the store.
    pub(crate) async fn close(self) {
        match self {
            Self::Embedded(store) => store.close().await,
            Self::Cluster(store) => store.close().await,
        }
    }
}
