//! How the server is put together, and taken apart again. The binary and the tests start the same
//! thing from here.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use qpq_ports::Clock;
use qpq_rpc::{Parts, Rpc};
use qpq_runtime::{
    config::ListenOn,
    data_dir::DataDirError,
    http::{HttpError, HttpServer, Probe, Schedule},
    lifecycle::{TaskFailure, Tasks},
    metrics::{self, Metrics},
};
use qpq_store_cluster::ConnectError;
use qpq_store_embedded::OpenError;
use qpq_transport::{BindError, Certificates, Fingerprint, IdentityError, Member, Reload, Server};

use crate::{
    Config,
    certificate::CertificateError,
    cluster::PasswordFileError,
    maintenance, probe,
    secrets::SecretsError,
    service::Edge,
    store::{Opened, Store},
};

/// For /livez: the server from the outside. Three failures, because a restart ends every
/// connection.
const LIVENESS: Schedule =
    Schedule { every: Duration::from_secs(10), within: Duration::from_secs(8), tolerance: 3 };
/// For /readyz and Health: whether the store can commit.
const READINESS: Schedule =
    Schedule { every: Duration::from_secs(5), within: Duration::from_secs(5), tolerance: 1 };

/// A server at work. Dropping it ends it abruptly; [`Running::shutdown`] does it gently.
#[derive(Debug)]
#[must_use = "a dropped server closes its connections"]
pub struct Running {
    server: Server<Edge>,
    http: Option<SocketAddr>,
    certificates: Arc<Certificates>,
    certificate_created: Option<PathBuf>,
    member: Option<Member>,
    store: Store,
    tasks: Tasks,
    drain: Duration,
}

/// Why the server does not start, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error("the data directory {0}")]
    Store(#[from] OpenError),
    #[error(transparent)]
    Cluster(#[from] ConnectError),
    #[error(transparent)]
    PasswordFile(#[from] PasswordFileError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error(
        "UDP port {} of {} is taken: stop the server that listens there, or choose another port with --listen",
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

/// Starts a server. When this returns, clients are being served. Needs a tokio runtime.
pub async fn compose(config: &Config) -> Result<Running, StartError> {
    let metrics = metrics::install(env!("CARGO_PKG_VERSION"));
    let Opened { store, secrets, certificates, certificate_created, member } =
        Store::open(config).await?;
    let clock = store.clock();
    let rpc = Rpc::new(Parts {
        stores: store.stores(),
        clock: clock.clone(),
        opaque: secrets.opaque,
        signer: secrets.signer,
        config: config.rpc(),
    });
    // So that Health says from the first call on what the probe would find: a failure is reported by
    // the probe, and is no reason not to start.
    let _ = rpc.check_store().await;
    match listen(config, &rpc, &certificates, member.clone()).await {
        Ok((http, server)) => {
            let mut running = Running {
                server,
                http: http.as_ref().map(HttpServer::address),
                certificates,
                certificate_created,
                member,
                store,
                tasks: Tasks::default(),
                drain: config.drain.timeout,
            };
            running.look_after(config, http, rpc, clock, metrics);
            Ok(running)
        }
        Err(error) => {
            // So that the next attempt, perhaps from this process, finds the store free.
            store.close().await;
            Err(error)
        }
    }
}

/// Opens the ports. QUIC comes last: once it is open, clients are served.
async fn listen(
    config: &Config,
    rpc: &Arc<Rpc>,
    certificates: &Arc<Certificates>,
    member: Option<Member>,
) -> Result<(Option<HttpServer>, Server<Edge>), StartError> {
    let http = match config.http.listen {
        ListenOn::Off => None,
        ListenOn::At(address) => Some(HttpServer::bind(address).await?),
    };
    let (transport, certificates) = (config.transport(), Arc::clone(certificates));
    let edge = Arc::new(Edge(Arc::clone(rpc)));
    let server = match member {
        Some(member) => Server::bind_in_fleet(member, transport, certificates, edge)?,
        None => Server::bind(transport, certificates, edge)?,
    };
    Ok((http, server))
}

impl Running {
    /// Where clients connect.
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// The addresses where clients connect, at least one.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        self.server.local_addrs()
    }

    /// Where health and metrics are served, unless they are off.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http
    }

    /// Of the key that clients see, for them to pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.certificates.fingerprint()
    }

    /// Where a self-signed certificate was created although the configuration names a file.
    pub fn certificate_created(&self) -> Option<&Path> {
        self.certificate_created.as_deref()
    }

    /// Takes up certificate and key if their files have changed.
    pub fn reload_certificate(&self) -> Result<Reload, IdentityError> {
        self.certificates.reload()
    }

    /// Completes if something that should go on for ever has failed. Cancel-safe.
    pub async fn failure(&mut self) -> TaskFailure {
        self.tasks.failure().await
    }

    /// Stops gently: no new connections, calls in flight end, clients are told, everything is
    /// closed. Once `hurry` completes, calls in flight are no longer waited for.
    pub async fn shutdown(self, hurry: impl Future<Output = ()>) {
        tracing::info!(
            up_to = ?self.drain,
            "draining: new connections are refused, waiting calls answer, calls in flight may end"
        );
        tokio::select! {
            () = self.server.drain(self.drain) => tracing::info!("drained: all connections are closed"),
            () = hurry => {
                tracing::warn!("not waiting any longer for calls in flight");
                self.server.abort().await;
            }
        }
        drop(self.server);
        self.tasks.stop().await;
        tracing::info!("closing the store");
        self.store.close().await;
        tracing::info!("stopped");
    }

    fn look_after(
        &mut self,
        config: &Config,
        http: Option<HttpServer>,
        rpc: Arc<Rpc>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) {
        let tasks = &mut self.tasks;
        let (listening, certificates) = (self.server.local_addr(), Arc::clone(&self.certificates));
        let live = Probe::start(tasks, "liveness", LIVENESS, move || {
            probe::alive(listening, Arc::clone(&certificates))
        });
        let checked = Arc::clone(&rpc);
        let ready = Probe::start(tasks, "readiness", READINESS, move || {
            let rpc = Arc::clone(&checked);
            async move { rpc.check_store().await.map_err(|error| with_causes(&error)) }
        });
        tasks.spawn("other edges", Arc::clone(&rpc).hear_other_edges());
        tasks.spawn("sweep", maintenance::sweep(self.store.stores(), clock));
        tasks.spawn(
            "certificates",
            Arc::clone(&self.certificates).watch(config.tls.reload_interval),
        );
        if let Some(member) = &self.member {
            let watching = Arc::clone(&member.keys).watch(config.tls.reload_interval);
            tasks.spawn("shared keys", watching);
        }
        tasks.spawn("metrics", maintenance::fold(metrics.clone()));
        if let Some(http) = http {
            http.serve(tasks, live, ready, metrics);
        }
    }
}

/// An error and what it comes from, in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
