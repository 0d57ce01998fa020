//! The durable work of this server: its kinds, and the task that runs them.

use std::sync::Arc;

use qpq_jobs::{Runner, Work};
use qpq_ports::Stores;
use qpq_rpc::account_events::AccountEvents;
use qpq_runtime::lifecycle::Tasks;
use tokio_util::sync::CancellationToken;

use crate::{
    Config, blobs::CollectBlobs, erasure::Erase, maintenance::Sweep, rotation::RotateTicketKeys,
    store::Store,
};

/// Starts the runner as one of `tasks`. Once `draining` is cancelled, the runner claims no more
/// jobs and waits for the runs in progress. Runs that do not end in time are released for another
/// edge. Returns a token that is cancelled when the runner has ended.
pub(crate) fn start(
    tasks: &mut Tasks,
    config: &Config,
    store: &Store,
    account_events: Arc<AccountEvents>,
    draining: CancellationToken,
) -> CancellationToken {
    let mut runner = Runner::new(store.stores().jobs, store.clock());
    for work in kinds(config, store, account_events) {
        runner.add(work);
    }
    let ended = CancellationToken::new();
    let end = ended.clone().drop_guard();
    tasks.spawn("jobs", async move {
        let _end = end;
        runner.run(draining).await;
    });
    ended
}

/// Returns the kinds of work. A new kind is a type that implements [`Work`], and a line here.
fn kinds(config: &Config, store: &Store, account_events: Arc<AccountEvents>) -> Vec<Arc<dyn Work>> {
    let Stores { maintenance, accounts, blobs, .. } = store.stores();
    let mut kinds: Vec<Arc<dyn Work>> = vec![
        Arc::new(Sweep { maintenance, account_events }),
        Arc::new(Erase { accounts }),
        Arc::new(CollectBlobs { blobs }),
    ];
    let cluster = config.cluster_sections();
    if let (Some(dir), Some(interval)) = (cluster.secrets_dir(), config.cluster.rotate_ticket_keys)
    {
        kinds.push(Arc::new(RotateTicketKeys { dir: dir.clone(), interval }));
    }
    kinds
}
