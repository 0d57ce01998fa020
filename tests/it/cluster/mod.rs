//! The guarantees of a cluster, each with a test of its name, on real stores. The answer to every
//! call is recorded and checked.

mod accounts;
mod acked_never_lost;
mod clients;
mod clocks;
mod configuration;
mod conversations;
mod drain;
mod faults;
mod greed;
mod history;
mod inboxes;
mod jobs;
mod key_packages;
mod lost_connections;
mod outage;
mod revocation;
mod store_changes;
mod wakes;

use std::time::Duration;

use qpq_tests::{client::Client, cluster::Cluster, roaming::Roamer};
use tokio::time::{Instant, sleep};

/// The time limit of [`until`].
const STUCK: Duration = Duration::from_secs(60);

/// Waits until `holds` returns true. Returns the time that it took.
///
/// # Panics
/// If the condition does not hold within [`STUCK`].
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) -> Duration {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < STUCK, "not after {STUCK:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

/// Connects to each of the first `edges` edges. The connections stay at their edges.
async fn client_at_each(cluster: &Cluster, edges: usize) -> Vec<Client> {
    let entry_points = cluster.entry_points();
    let mut clients = Vec::new();
    for edge in 0..edges {
        clients.push(Roamer::at(&entry_points, edge).patient().connected().await);
    }
    clients
}
