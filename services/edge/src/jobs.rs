//! The durable work of this server: its kinds, and the task that runs them.

use std::sync::Arc;

use qpq_jobs::{Runner, Work};
use qpq_ports::Clock;
use qpq_rpc::account_events::AccountEvents;
use qpq_runtime::lifecycle::Tasks;
use tokio::sync::watch;

use crate::{Config, maintenance::Sweep, rotation::RotateTicketKeys, store::Store};

/// The jobs that run on this server.
#[derive(Debug)]
pub(crate) struct Running {
    stop: watch::Sender<bool>,
}

impl Running {
    /// Starts the runner as one of `tasks`.
    pub(crate) fn start(
        tasks: &mut Tasks,
        config: &Config,
        store: &Store,
        clock: Arc<dyn Clock>,
        account_events: Arc<AccountEvents>,
    ) -> Self {
        let mut runner = Runner::new(store.stores().jobs, clock);
        for work in kinds(config, store, account_events) {
            runner.add(work);
        }
        let (stop, stopped) = watch::channel(false);
        tasks.spawn("jobs", runner.run(stopped));
        Self { stop }
    }

    /// Claims no more jobs and waits for the runs in progress. Those that do not end in time are
    /// released for another edge.
    pub(crate) async fn drain(&self) {
        self.stop.send_replace(true);
        // The runner drops its receiver at its end.
        self.stop.closed().await;
    }
}

/// The kinds of work. To add one: a type that implements [`Work`], and a line here.
fn kinds(config: &Config, store: &Store, account_events: Arc<AccountEvents>) -> Vec<Arc<dyn Work>> {
    let maintenance = store.stores().maintenance;
    let mut kinds: Vec<Arc<dyn Work>> = vec![Arc::new(Sweep { maintenance, account_events })];
    let cluster = config.cluster_sections();
    if let (Some(dir), Some(interval)) = (cluster.secrets_dir(), config.cluster.rotate_ticket_keys)
    {
        kinds.push(Arc::new(RotateTicketKeys { dir: dir.clone(), interval }));
    }
    kinds
}
