//! The promises of a cluster, each a test by its name, on real stores: what every call was answered
//! is recorded and judged.

mod accounts;
mod acked_never_lost;
mod clients;
mod clocks;
mod configuration;
mod drain;
mod faults;
mod history;
mod inboxes;
mod jobs;
mod key_packages;
mod lost_connections;
mod outage;
mod revocation;
mod wakes;

use std::time::Duration;

use qpq_tests::{client::Client, cluster::Cluster, roaming::Roamer};
use tokio::time::{Instant, sleep};

/// After this a test is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// Returns how long it took until `holds`, looking often.
///
/// # Panics
/// If that never comes.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) -> Duration {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < STUCK, "not after {STUCK:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

/// A connection to each of the first `edges` edges, which stays there.
async fn client_at_each(cluster: &Cluster, edges: usize) -> Vec<Client> {
    let fleet = cluster.fleet();
    let mut clients = Vec::new();
    for edge in 0..edges {
        clients.push(Roamer::at(&fleet, edge).patient().connected().await);
    }
    clients
}
