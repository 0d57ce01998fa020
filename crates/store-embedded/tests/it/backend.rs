//! The embedded store as a backend of the conformance suite. Its crash is the end of its runtime:
//! tasks, leases and caches are lost at any point, and nothing is closed. `kill` and `histories`
//! kill a process instead.

use async_trait::async_trait;
use qpq_domain::{StoreLimits, UnixMillis};
use qpq_ports::{
    Stores,
    conformance::{Backend, Factory},
};
use qpq_store_embedded::{EmbeddedStore, accept_clock};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

#[derive(Debug)]
pub(crate) struct Embedded;

#[async_trait]
impl Factory for Embedded {
    async fn fresh(&self, limits: StoreLimits) -> Box<dyn Backend> {
        let directory = tempfile::tempdir().expect("a directory");
        Box::new(Running {
            process: Some(Process::start(&directory, limits).await),
            directory,
            limits,
        })
    }
}

struct Running {
    process: Option<Process>,
    directory: TempDir,
    limits: StoreLimits,
}

#[async_trait]
impl Backend for Running {
    fn stores(&self) -> Stores {
        self.process.as_ref().expect("running").store.stores()
    }

    async fn crash(&mut self) {
        self.process.take().expect("running").crash().await;
        self.process = Some(Process::start(&self.directory, self.limits).await);
    }

    async fn set_clock(&self, now: UnixMillis) {
        let accepted = accept_clock(self.directory.path(), now).await;
        accepted.unwrap_or_else(|error| panic!("{error}"));
        // The sweep reads the accepted time. Nothing has expired at the instant 0.
        self.stores().maintenance.sweep(UnixMillis(0)).await.expect("a sweep");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.runtime.shutdown_background();
        }
    }
}

/// A runtime, which stands for the process of the store.
pub(crate) struct Process {
    pub(crate) store: EmbeddedStore,
    runtime: Runtime,
}

impl Process {
    pub(crate) async fn start(directory: &TempDir, limits: StoreLimits) -> Self {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let path = directory.path().to_owned();
        let opening = runtime.spawn(async move { EmbeddedStore::open(&path, limits).await });
        let store = opening.await.expect("no panic").unwrap_or_else(|error| panic!("{error}"));
        Self { store, runtime }
    }

    pub(crate) async fn crash(self) {
        // A runtime must not be dropped by a task. The end of the runtime is awaited because it
        // unlocks the directory, as the end of a process does.
        let runtime = self.runtime;
        tokio::task::spawn_blocking(move || drop(runtime)).await.expect("no panic");
    }
}
