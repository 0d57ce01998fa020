//! The faults of a network, each in its own scenario: a killed edge, a partition, latency, low
//! bandwidth, resets, and all of them together. The records of the traffic have no violation.

use std::{num::NonZeroU64, time::Duration};

use qpq_test_services::proxy::{Faults, Link, Switch, Way};
use qpq_tests::{
    cluster::{Cluster, Links, Place, Plan, Wiring},
    traffic::{self, Traffic},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::sleep;

const EDGES: usize = 3;
const MESSAGES: u64 = 3_000;
/// The number of acknowledged messages between two faults.
const EVERY: u64 = 300;
/// The maximum duration of a partition, longer than the timeout of clients for a silent edge.
const CUT_OFF: Duration = Duration::from_secs(4);

struct Scenario {
    cluster: Cluster,
    traffic: Traffic,
    random: StdRng,
    next: u64,
}

impl Scenario {
    async fn new(place: Place, seed: u64) -> Self {
        let plan = Plan { edges: EDGES, place, wiring: Wiring::Proxied, seed, ..Plan::default() };
        let cluster = Cluster::start(plan).await.expect("a cluster");
        let load =
            traffic::Plan { messages: MESSAGES, batches: 2, seed, ..traffic::Plan::default() };
        let traffic = Traffic::start(&cluster, load).await.expect("traffic");
        Self { cluster, traffic, random: StdRng::seed_from_u64(seed), next: 0 }
    }

    /// Waits for [`EVERY`] more acknowledged messages. Returns a random edge, or `None` at the end.
    async fn next_edge(&mut self) -> Option<usize> {
        self.next += EVERY;
        if self.next >= MESSAGES {
            return None;
        }
        self.traffic.acknowledged(self.next).await;
        Some(self.random.gen_range(0..EDGES))
    }

    fn links(&self, edge: usize) -> &Links {
        self.cluster.links(edge)
    }

    fn all(&self, faults: Faults) {
        for edge in 0..EDGES {
            switches(self.links(edge)).into_iter().for_each(|switch| switch.set(faults));
        }
    }

    async fn ends_clean(self) {
        self.all(Faults::default());
        let summary = self.traffic.finish(&self.cluster).await.expect("an end of the traffic");
        summary.report.assert_clean();
        assert!(summary.report.acknowledged as u64 >= MESSAGES);
    }
}

fn switches(links: &Links) -> [&Switch; 4] {
    [links.clients.switch(), links.postgres.switch(), links.redis.switch(), links.nats.switch()]
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_edges_cause_no_violation() {
    let mut scenario = Scenario::new(Place::Apart, 0xd0).await;
    while let Some(edge) = scenario.next_edge().await {
        scenario.cluster.kill_edge(edge).await.unwrap();
        let down = scenario.random.gen_range(0..1_000);
        sleep(Duration::from_millis(down)).await;
        scenario.cluster.start_edge(edge).await.unwrap();
    }
    scenario.ends_clean().await;
}

/// One edge loses its clients or one store, in one direction or both.
#[tokio::test(flavor = "multi_thread")]
async fn network_partitions_cause_no_violation() {
    let mut scenario = Scenario::new(Place::Here, 0xba).await;
    while let Some(edge) = scenario.next_edge().await {
        let way = [Way::Both, Way::ToTarget, Way::ToClient][scenario.random.gen_range(0..3)];
        let (which, share) = (scenario.random.gen_range(0..4), scenario.random.r#gen());
        let switch = switches(scenario.links(edge))[which].clone();
        switch.change(|faults| faults.link = Link::Blackhole(way));
        sleep(CUT_OFF.mul_f64(share)).await;
        switch.heal();
    }
    scenario.ends_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn latency_and_jitter_cause_no_violation() {
    let mut scenario = Scenario::new(Place::Here, 0x1a).await;
    while scenario.next_edge().await.is_some() {
        let latency = Duration::from_millis(scenario.random.gen_range(0..30));
        let jitter = Duration::from_millis(scenario.random.gen_range(0..30));
        scenario.all(Faults { latency, jitter, ..Faults::default() });
    }
    scenario.ends_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn low_bandwidth_causes_no_violation() {
    let mut scenario = Scenario::new(Place::Here, 0x7b).await;
    while scenario.next_edge().await.is_some() {
        let rate = NonZeroU64::new(scenario.random.gen_range(60_000..400_000));
        scenario.all(Faults { throttle: rate, ..Faults::default() });
    }
    scenario.ends_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_resets_cause_no_violation() {
    let mut scenario = Scenario::new(Place::Here, 0x5e7).await;
    while let Some(edge) = scenario.next_edge().await {
        for _ in 0..scenario.random.gen_range(1..20) {
            let which = scenario.random.gen_range(0..4);
            switches(scenario.links(edge))[which].cut_all();
            let pause = scenario.random.gen_range(0..50);
            sleep(Duration::from_millis(pause)).await;
        }
        let which = scenario.random.gen_range(0..4);
        let switch = switches(scenario.links(edge))[which].clone();
        switch.change(|faults| faults.link = Link::Reset);
        let refused = scenario.random.gen_range(0..1_000);
        sleep(Duration::from_millis(refused)).await;
        switch.heal();
    }
    let cut: u64 =
        (0..EDGES).flat_map(|edge| switches(scenario.links(edge)).map(|s| s.tally().cut)).sum();
    assert!(cut > 100, "only {cut} connections were cut");
    scenario.ends_clean().await;
}

/// Datagrams are lost, duplicated and reordered while stores are slow, connections are cut and
/// edges are killed.
#[tokio::test(flavor = "multi_thread")]
async fn combined_faults_cause_no_violation() {
    let mut scenario = Scenario::new(Place::Apart, 0xc0).await;
    while let Some(edge) = scenario.next_edge().await {
        let ms = Duration::from_millis;
        let jitter = ms(scenario.random.gen_range(0..10));
        scenario.all(Faults { latency: ms(1), jitter, ..Faults::default() });
        for edge in 0..EDGES {
            scenario.links(edge).clients.switch().change(|faults| {
                (faults.loss, faults.duplication, faults.reordering) = (0.05, 0.05, 0.05);
                faults.held_back = ms(20);
            });
        }
        scenario.links((edge + 1) % EDGES).redis.switch().cut_all();
        scenario.links((edge + 2) % EDGES).postgres.switch().cut_all();
        scenario.cluster.kill_edge(edge).await.unwrap();
        if scenario.random.r#gen() {
            scenario.cluster.redis.flush_all().await.unwrap();
        }
        scenario.cluster.start_edge(edge).await.unwrap();
    }
    scenario.ends_clean().await;
}
