//! Starts and stops a server. The binary and the tests both use [`compose`].

use std::{
    collections::HashSet,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use qpq_domain::Username;
use qpq_ports::Accounts;
use qpq_rpc::{Parts, Rpc};
use qpq_runtime::{
    config::ListenOn,
    data_dir::DataDirError,
    http::{HttpError, HttpServer, Probe, Schedule},
    lifecycle::{TaskFailure, Tasks},
    metrics::{self, Metrics},
    service_manager::ServiceManager,
};
use qpq_store_cluster::ConnectError;
use qpq_store_embedded::OpenError;
use qpq_transport::{
    BindError, Certificates, ClusterEdge, Fingerprint, IdentityError, Reload, Server,
};
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    at_rest::AtRestError,
    certificate::CertificateError,
    cluster::PasswordFileError,
    jobs, maintenance, probe,
    secrets::SecretsError,
    service::Edge,
    store::{Opened, Store},
};

/// The schedule of the probe of /livez, which connects as a client does. Two failures in a row are
/// tolerated, because a restart ends every connection.
const LIVENESS: Schedule =
    Schedule { every: Duration::from_secs(10), within: Duration::from_secs(8), tolerance: 3 };
/// The schedule of the probe of /readyz and Health, which checks that the store can commit.
const READINESS: Schedule =
    Schedule { every: Duration::from_secs(5), within: Duration::from_secs(5), tolerance: 1 };

/// A running server. Dropping it closes all connections immediately. [`Running::shutdown`] lets
/// calls in progress end.
#[derive(Debug)]
#[must_use = "a dropped server closes its connections"]
pub struct Running {
    server: Server<Edge>,
    rpc: Arc<Rpc>,
    http: Option<SocketAddr>,
    certificates: Arc<Certificates>,
    certificate_created: Option<PathBuf>,
    unregistered_admins: Vec<Username>,
    cluster_edge: Option<ClusterEdge>,
    store: Store,
    tasks: Tasks,
    /// Cancelled when the last job has ended. `None` until the server is composed.
    jobs_ended: Option<CancellationToken>,
    /// The probe of liveness. `None` until the server is composed.
    live: Option<Probe>,
    drain: Duration,
}

/// The reason why the server does not start, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error(transparent)]
    AtRest(#[from] AtRestError),
    #[error("the data directory {0}")]
    Store(#[from] OpenError),
    #[error(transparent)]
    Cluster(#[from] ConnectError),
    #[error(transparent)]
    PasswordFile(#[from] PasswordFileError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error(
        "UDP port {} of {} is in use. Stop the server that listens there, or choose another port \
         with --listen",
        .0.port(), .0.ip()
    )]
    Taken(SocketAddr),
    #[error("{0}. Choose another address with --listen")]
    Listen(BindError),
    #[error(transparent)]
    Http(#[from] HttpError),
}

impl From<BindError> for StartError {
    fn from(error: BindError) -> Self {
        match error {
            BindError::Socket { addr, source } if source.kind() == io::ErrorKind::AddrInUse => {
                Self::Taken(addr)
            }
            error => Self::Listen(error),
        }
    }
}

/// Starts a server. When this returns, clients are served. Needs a tokio runtime.
pub async fn compose(config: &Config) -> Result<Running, StartError> {
    compose_with(config, CancellationToken::new()).await
}

/// Starts a server as [`compose`] does, with the drain token of the process.
/// [`Running::shutdown`] cancels the token if no signal has cancelled it.
pub async fn compose_with(
    config: &Config,
    draining: CancellationToken,
) -> Result<Running, StartError> {
    let metrics = metrics::install(env!("CARGO_PKG_VERSION"));
    let opened = Store::open(config).await?;
    let Opened { store, secrets, at_rest, certificates, certificate_created, edge: cluster_edge } =
        opened;
    let rpc = Rpc::new(Parts {
        stores: store.stores(),
        clock: store.clock(),
        opaque: secrets.opaque,
        signer: secrets.signer,
        at_rest,
        config: config.rpc(),
        draining: draining.clone(),
    });
    // The first check, so that Health answers correctly from the first call on. A failure does not
    // prevent the start, because the probe reports it.
    let _ = rpc.check_store().await;
    let accounts = &rpc.app().stores.accounts;
    let unregistered_admins = unregistered(&rpc.app().config.admins, &**accounts).await;
    let transport = qpq_transport::Config { draining: draining.clone(), ..config.transport() };
    match listen(config, transport, &rpc, &certificates, cluster_edge.clone()).await {
        Ok((http, server)) => {
            let mut running = Running {
                server,
                rpc: Arc::clone(&rpc),
                http: http.as_ref().map(HttpServer::address),
                certificates,
                certificate_created,
                unregistered_admins,
                cluster_edge,
                store,
                tasks: Tasks::default(),
                jobs_ended: None,
                live: None,
                drain: config.drain.timeout,
            };
            running.start_tasks(config, http, rpc, metrics, draining);
            Ok(running)
        }
        Err(error) => {
            // The next attempt, maybe in this process, needs the lock of the store.
            store.close().await;
            Err(error)
        }
    }
}

/// Returns the administrators without an account, in alphabetical order. Leaves out those whose
/// accounts cannot be read now.
async fn unregistered(admins: &HashSet<Username>, accounts: &dyn Accounts) -> Vec<Username> {
    let mut unregistered = Vec::new();
    for admin in admins {
        if matches!(accounts.by_username(admin).await, Ok(None)) {
            unregistered.push(admin.clone());
        }
    }
    unregistered.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    if !unregistered.is_empty() {
        tracing::warn!(
            unregistered = unregistered.len(),
            "admin.usernames lists usernames without an account, which need an invite: run \
             qpq-admin invite create --username NAME"
        );
    }
    unregistered
}

/// Opens the ports. QUIC is last: once it is open, clients are served.
async fn listen(
    config: &Config,
    transport: qpq_transport::Config,
    rpc: &Arc<Rpc>,
    certificates: &Arc<Certificates>,
    cluster_edge: Option<ClusterEdge>,
) -> Result<(Option<HttpServer>, Server<Edge>), StartError> {
    let http = match config.http.listen {
        ListenOn::Off => None,
        ListenOn::At(address) => Some(HttpServer::bind(address).await?),
    };
    let certificates = Arc::clone(certificates);
    let edge = Arc::new(Edge(Arc::clone(rpc)));
    let server = match cluster_edge {
        Some(cluster_edge) => Server::bind_in_cluster(cluster_edge, transport, certificates, edge)?,
        None => Server::bind(transport, certificates, edge)?,
    };
    Ok((http, server))
}

impl Running {
    /// Returns the first address that clients connect to.
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Returns the addresses that clients connect to, at least one.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        self.server.local_addrs()
    }

    /// Returns the address of health and metrics, unless they are off.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http
    }

    /// Returns the fingerprint of the server's key, for clients to pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.certificates.fingerprint()
    }

    /// Returns the path of a certificate that was created although the configuration names a file.
    pub fn certificate_created(&self) -> Option<&Path> {
        self.certificate_created.as_deref()
    }

    /// Returns the administrators that had no account when the server started.
    pub fn unregistered_admins(&self) -> &[Username] {
        &self.unregistered_admins
    }

    /// Notifies the service manager at intervals while the server is alive.
    pub fn keep_alive(&mut self, manager: ServiceManager, every: Duration) {
        if let Some(live) = self.live.clone() {
            self.tasks.spawn("watchdog", manager.keep_alive(every, live));
        }
    }

    /// Reloads certificate and key if their files have changed.
    pub fn reload_certificate(&self) -> Result<Reload, IdentityError> {
        self.certificates.reload()
    }

    /// Completes when a task that runs as long as the server has failed. Cancel-safe.
    pub async fn failure(&mut self) -> TaskFailure {
        self.tasks.failure().await
    }

    /// Stops the server: refuses new connections, claims no more jobs, waits for calls and jobs in
    /// progress, and closes all connections and the store. Once `hurry` completes, calls and jobs
    /// in progress are aborted.
    pub async fn shutdown(self, hurry: impl Future<Output = ()>) {
        tracing::info!(
            up_to = ?self.drain,
            "draining: new connections are refused, waiting calls answer, calls in progress may end"
        );
        let drained = async {
            let jobs = async {
                if let Some(ended) = &self.jobs_ended {
                    ended.cancelled().await;
                }
            };
            tokio::join!(self.server.drain(self.drain), jobs);
            if tokio::time::timeout(self.drain, self.rpc.closed()).await.is_err() {
                tracing::warn!("tasks of calls did not end, closing the store without them");
            }
        };
        tokio::select! {
            () = drained => tracing::info!("drained: all connections are closed"),
            () = hurry => {
                tracing::warn!("hurried: calls in progress are aborted");
                self.server.abort().await;
            }
        }
        drop(self.server);
        self.tasks.stop().await;
        tracing::info!("closing the store");
        self.store.close().await;
        tracing::info!("stopped");
    }

    fn start_tasks(
        &mut self,
        config: &Config,
        http: Option<HttpServer>,
        rpc: Arc<Rpc>,
        metrics: Metrics,
        draining: CancellationToken,
    ) {
        let tasks = &mut self.tasks;
        let (listening, certificates) = (self.server.local_addr(), Arc::clone(&self.certificates));
        let live = Probe::start(tasks, "liveness", LIVENESS, move || {
            probe::alive(listening, Arc::clone(&certificates))
        });
        self.live = Some(live.clone());
        let checked = Arc::clone(&rpc);
        let ready = Probe::start(tasks, "readiness", READINESS, move || {
            let rpc = Arc::clone(&checked);
            async move { rpc.check_store().await.map_err(|error| with_causes(&error)) }
        });
        let account_events = Arc::clone(&rpc.app().account_events);
        tasks.spawn("account events", Arc::clone(&rpc).receive_account_events());
        self.jobs_ended = Some(jobs::start(tasks, config, &self.store, account_events, draining));
        tasks.spawn(
            "certificates",
            Arc::clone(&self.certificates).watch(config.tls.reload_interval),
        );
        if let Some(edge) = &self.cluster_edge {
            let watching = Arc::clone(&edge.keys).watch(config.tls.reload_interval);
            tasks.spawn("shared keys", watching);
        }
        tasks.spawn("metrics", maintenance::fold(metrics.clone()));
        if let Some(http) = http {
            http.serve(tasks, live, ready, metrics);
        }
    }
}

/// Returns an error and its causes in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
