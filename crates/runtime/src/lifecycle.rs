//! The end of a process: on a signal in two steps, or because one of its tasks failed.
//!
//! The first SIGTERM or SIGINT starts the drain; the second one ends the process immediately. Tasks
//! are supervised: a task that panics or fails ends the process with an error.

use std::{future::Future, io};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// The two steps in which a process ends, shared by all clones.
#[derive(Clone, Debug)]
pub struct Shutdown {
    draining: CancellationToken,
    stopping: CancellationToken,
}

impl Default for Shutdown {
    fn default() -> Self {
        let stopping = CancellationToken::new();
        Self { draining: stopping.child_token(), stopping }
    }
}

impl Shutdown {
    /// Returns the token of the first step. Once cancelled, running work is finished and no new
    /// work is accepted.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Returns the token of the second step. Once cancelled, the process ends immediately. A cancel
    /// of this token also cancels the token of the first step.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Starts a task that advances by one step on each SIGTERM or SIGINT.
    pub fn on_signals(&self, tasks: &mut Tasks) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        tasks.spawn("signals", async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                let (step, token) = if shutdown.draining.is_cancelled() {
                    ("stop", &shutdown.stopping)
                } else {
                    ("drain", &shutdown.draining)
                };
                tracing::info!(signal = name, step, "signal received");
                token.cancel();
            }
        });
        Ok(())
    }
}

/// The tasks that run as long as the process. Dropping this aborts them.
#[derive(Debug, Default)]
pub struct Tasks(JoinSet<Result<(), TaskFailure>>);

/// The failure of a supervised task.
#[derive(Debug, thiserror::Error)]
pub enum TaskFailure {
    #[error("the {task} task panicked: {message}. This is a bug; please report it with the log")]
    Panicked { task: &'static str, message: String },
    #[error("the {task} task failed: {source:#}")]
    Failed { task: &'static str, source: anyhow::Error },
}

impl Tasks {
    /// Spawns `work`. The process continues after `work` has returned.
    pub fn spawn(&mut self, task: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.try_spawn(task, async move {
            work.await;
            Ok(())
        });
    }

    /// Spawns `work`. Its error becomes the failure of the process.
    pub fn try_spawn(
        &mut self,
        task: &'static str,
        work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        // An inner task, so that a panic is reported with the task's name.
        let mut inner = JoinSet::new();
        inner.spawn(work);
        self.0.spawn(async move {
            match inner.join_next().await.expect("one task was spawned") {
                Ok(outcome) => outcome.map_err(|source| TaskFailure::Failed { task, source }),
                Err(error) if error.is_panic() => Err(TaskFailure::Panicked {
                    task,
                    message: panic_message(&*error.into_panic()),
                }),
                Err(_) => Ok(()),
            }
        });
    }

    /// Waits for the first failure. Cancel-safe.
    pub async fn failure(&mut self) -> TaskFailure {
        loop {
            match self.0.join_next().await {
                Some(Ok(Err(failure))) => return failure,
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Aborts all tasks and waits until they have ended.
    pub async fn stop(mut self) {
        self.0.shutdown().await;
    }
}

/// Returns the message of a panic.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stopping_implies_draining() {
        let shutdown = Shutdown::default();
        let waiting = shutdown.clone();
        shutdown.stopping().cancel();
        waiting.draining().cancelled().await;
    }

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_stops() {
        let (shutdown, mut tasks) = (Shutdown::default(), Tasks::default());
        shutdown.on_signals(&mut tasks).unwrap();
        nix::sys::signal::raise(nix::sys::signal::SIGTERM).unwrap();
        shutdown.draining().cancelled().await;
        assert!(!shutdown.stopping().is_cancelled());
        nix::sys::signal::raise(nix::sys::signal::SIGINT).unwrap();
        shutdown.stopping().cancelled().await;
    }

    #[tokio::test]
    async fn a_panic_is_reported_with_the_name_of_the_task() {
        let mut tasks = Tasks::default();
        tasks.spawn("quiet", async {});
        tasks.spawn("loud", async { panic!("out of cheese") });
        assert_eq!(
            tasks.failure().await.to_string(),
            "the loud task panicked: out of cheese. This is a bug; please report it with the log"
        );
    }

    #[tokio::test]
    async fn an_error_of_a_task_is_reported_with_its_causes() {
        let mut tasks = Tasks::default();
        tasks.try_spawn("maintenance", async { Err(anyhow::anyhow!("cause").context("effect")) });
        assert_eq!(tasks.failure().await.to_string(), "the maintenance task failed: effect: cause");
    }

    #[tokio::test]
    async fn stop_aborts_a_task_that_never_ends() {
        struct NotifyOnDrop(Option<tokio::sync::oneshot::Sender<()>>);
        impl Drop for NotifyOnDrop {
            fn drop(&mut self) {
                let _ = self.0.take().unwrap().send(());
            }
        }
        let (sender, dropped) = tokio::sync::oneshot::channel();
        let mut tasks = Tasks::default();
        let guard = NotifyOnDrop(Some(sender));
        tasks.spawn("endless", async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        tasks.stop().await;
        dropped.await.expect("the task's state was dropped");
    }
}
