//! Pages for operators: `/livez`, `/readyz` and `/metrics` over plain HTTP, on loopback by default.
//!
//! Liveness is a [`Probe`] that calls the service as a client does; readiness is a probe of its
//! stores. Readiness does not fail while the server drains: a load balancer would cut live UDP
//! flows. The server tells each client to reconnect instead.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    config::ListenOn,
    lifecycle::Tasks,
    metrics::{LIVE, Metrics, READY},
};

mod bounded;

crate::section! {
    /// Health and metrics over HTTP, unencrypted: keep it off public networks.
    pub struct Http {
        /// The address that serves `/livez`, `/readyz` and `/metrics`.
        listen: ListenOn = ListenOn::At(SocketAddr::from(([127, 0, 0, 1], 9464)));
    }
}

/// A repeated check with its latest outcome.
#[derive(Clone, Debug)]
pub struct Probe(watch::Receiver<Result<(), String>>);

/// The interval, the time limit and the tolerance of a probe.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub every: Duration,
    /// The time limit of one check.
    pub within: Duration,
    /// The number of consecutive failed checks after which the probe fails.
    pub tolerance: u32,
}

impl Probe {
    /// Starts the checks. The probe passes until it fails for the first time.
    pub fn start<F, Fut>(
        tasks: &mut Tasks,
        name: &'static str,
        schedule: Schedule,
        check: F,
    ) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), String>> + Send,
    {
        let (outcome, probe) = watch::channel(Ok(()));
        tasks.spawn(name, async move {
            let mut ticks = interval(schedule.every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut failures = 0;
            loop {
                ticks.tick().await;
                let late = || Err(format!("no answer within {:?}", schedule.within));
                match timeout(schedule.within, check()).await.unwrap_or_else(|_| late()) {
                    Ok(()) => {
                        if outcome.borrow().is_err() {
                            tracing::info!(probe = name, "probe passes again");
                        }
                        failures = 0;
                        let _ = outcome.send_replace(Ok(()));
                    }
                    Err(reason) => {
                        failures += 1;
                        tracing::warn!(probe = name, failures, %reason, "probe check failed");
                        if failures >= schedule.tolerance {
                            let _ = outcome.send_replace(Err(reason));
                        }
                    }
                }
            }
        });
        Self(probe)
    }

    /// Returns whether fewer than `tolerance` checks in a row have failed.
    pub fn passes(&self) -> bool {
        self.0.borrow().is_ok()
    }

    /// Waits for a change of the outcome. Returns `false` once the checks have ended.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

/// A bound listener.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
}

/// The reason why the listener could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error(
        "another program uses TCP port {0}. Choose another port with http.listen \
         (QPQ_HTTP__LISTEN), or turn these pages off with \"off\""
    )]
    AddressInUse(SocketAddr),
    #[error(
        "cannot serve HTTP on {address}: {source}. Change http.listen (QPQ_HTTP__LISTEN), or set it to \"off\""
    )]
    Bind { address: SocketAddr, source: io::Error },
}

/// The sources of the pages.
#[derive(Debug)]
struct Pages {
    live: Probe,
    ready: Probe,
    metrics: Metrics,
}

impl HttpServer {
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        let bound = async {
            let listener = TcpListener::bind(address).await?;
            Ok(Self { address: listener.local_addr()?, listener })
        };
        bound.await.map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => HttpError::AddressInUse(address),
            _ => HttpError::Bind { address, source },
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves the pages in one of `tasks`, until it is stopped.
    pub fn serve(self, tasks: &mut Tasks, live: Probe, ready: Probe, metrics: Metrics) {
        let pages = Arc::new(Pages { live, ready, metrics });
        let router = Router::new()
            .route("/livez", get(|pages: State<Arc<Pages>>| async move { health(&pages.live) }))
            .route("/readyz", get(|pages: State<Arc<Pages>>| async move { health(&pages.ready) }))
            .route("/metrics", get(|pages: State<Arc<Pages>>| async move { pages.render() }))
            .with_state(pages);
        tasks.try_spawn("http", async move {
            let listener = bounded::Bounded::new(self.listener);
            Ok(axum::serve(listener, router).await?)
        });
    }
}

fn health(probe: &Probe) -> (StatusCode, &'static str) {
    if probe.passes() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "failing\n")
    }
}

impl Pages {
    fn render(&self) -> String {
        for (name, probe) in [(LIVE, &self.live), (READY, &self.ready)] {
            metrics::gauge!(name).set(if probe.passes() { 1.0 } else { 0.0 });
        }
        self.metrics.render()
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const SCHEDULE: Schedule =
        Schedule { every: Duration::from_secs(10), within: Duration::from_secs(5), tolerance: 3 };

    type Checked = std::pin::Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

    /// Returns a check with the given outcomes in order. Afterwards the check never completes.
    fn scripted(
        outcomes: &[Result<(), &str>],
    ) -> impl Fn() -> Checked + Send + Sync + 'static + use<> {
        let outcomes: Vec<_> = outcomes.iter().rev().map(|o| o.map_err(String::from)).collect();
        let outcomes = Mutex::new(outcomes);
        move || {
            let next = outcomes.lock().pop();
            Box::pin(async move {
                match next {
                    Some(outcome) => outcome,
                    None => std::future::pending().await,
                }
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_fails_after_three_failures_in_a_row_and_recovers_with_one_success() {
        let mut tasks = Tasks::default();
        let script = [Err("a"), Err("b"), Ok(()), Err("c"), Err("d"), Err("e"), Ok(())];
        let mut probe = Probe::start(&mut tasks, "test", SCHEDULE, scripted(&script));
        let mut seen = Vec::new();
        for _ in 0..4 {
            probe.changed().await;
            seen.push((tokio::time::Instant::now(), probe.passes()));
        }
        let verdicts: Vec<_> = seen.iter().map(|(_, passes)| *passes).collect();
        assert_eq!(verdicts, [true, false, true, false], "the script, then three checks that hang");
        assert_eq!(seen[1].0 - seen[0].0, Duration::from_secs(30));
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn pages_answer_and_follow_the_probes() {
        let mut tasks = Tasks::default();
        let schedule = Schedule { tolerance: 1, ..SCHEDULE };
        let live = Probe::start(&mut tasks, "live", schedule, scripted(&[Ok(())]));
        let mut ready = Probe::start(&mut tasks, "ready", schedule, scripted(&[Err("disk full")]));
        ready.changed().await;
        let server = HttpServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address();
        server.serve(&mut tasks, live, ready, crate::metrics::install("1.2.3"));

        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200 "));
        let ready = get(address, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 503 ") && !ready.contains("disk"), "{ready}");
        let metrics = get(address, "/metrics").await;
        assert!(metrics.contains("qpq_live 1") && metrics.contains("qpq_ready 0"), "{metrics}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404 "));
    }

    /// Without a limit, 173 idle connections used up the descriptors, and `/livez` failed.
    #[tokio::test]
    async fn idle_connections_do_not_block_probes() {
        let mut tasks = Tasks::default();
        let once = Schedule { tolerance: 1, ..SCHEDULE };
        let live = Probe::start(&mut tasks, "live", once, scripted(&[Ok(())]));
        let ready = Probe::start(&mut tasks, "ready", once, scripted(&[Ok(())]));
        let server = HttpServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address();
        server.serve(&mut tasks, live, ready, crate::metrics::install("1.2.3"));
        let mut idle = Vec::new();
        for _ in 0..173 {
            idle.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200 "));
        let mut left = [0; 1];
        let ended = idle[0].read(&mut left).await;
        assert!(matches!(ended, Ok(0) | Err(_)), "the oldest was closed: {ended:?}");
    }

    #[tokio::test]
    async fn a_port_in_use_names_the_setting_to_change() {
        let taken = HttpServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = HttpServer::bind(taken.address()).await.unwrap_err().to_string();
        assert!(
            error.contains(&taken.address().to_string()) && error.contains("QPQ_HTTP__LISTEN"),
            "{error}"
        );
    }
}
