//! A Redis Cluster for one test: primaries that share the slots, without replicas.

use std::time::Duration;

use anyhow::{bail, ensure};
use tokio::time::{Instant, sleep};

use crate::{
    authority::Authority,
    port::Port,
    process::{TIMEOUT, in_url, new_password},
    redis::Redis,
};

const SLOTS: usize = 16_384;
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running Redis Cluster. Dropping it ends all its nodes.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<Redis>,
    /// The ports of the cluster bus.
    buses: Vec<Port>,
}

impl RedisCluster {
    /// Starts `count` nodes, each with an equal part of the slots.
    pub async fn start(count: usize) -> anyhow::Result<Self> {
        Self::launch(count, None).await
    }

    /// Starts `count` nodes with TLS, for clients and between them.
    pub async fn start_encrypted(count: usize, authority: &Authority) -> anyhow::Result<Self> {
        Self::launch(count, Some(authority)).await
    }

    async fn launch(count: usize, authority: Option<&Authority>) -> anyhow::Result<Self> {
        ensure!(count > 0, "a cluster has at least one node");
        let password = new_password();
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..count {
            let bus = Port::reserve()?;
            let number = bus.number().to_string();
            let settings = [
                ("tls-cluster", if authority.is_some() { "yes" } else { "no" }),
                ("cluster-enabled", "yes"),
                ("cluster-port", &number),
                ("cluster-announce-ip", "127.0.0.1"),
                ("cluster-node-timeout", "2000"),
            ];
            nodes.push(Redis::launch(&password, &settings, &[], authority).await?);
            buses.push(bus);
        }
        let cluster = Self { nodes, buses };
        cluster.join().await?;
        cluster.wait_until_complete().await?;
        Ok(cluster)
    }

    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// Returns the URL with all nodes, in the store's format.
    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().map(|node| node.served_at().to_string()).collect();
        let first = &self.nodes[0];
        format!("{}+cluster://:{}@{}", first.scheme(), in_url(first.password()), hosts.join(","))
    }

    /// Returns the URL of each node. A client needs one of them.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Redis::url).collect()
    }

    /// Waits until all nodes see each other and all slots are served, after a start or the return
    /// of a node.
    pub async fn wait_until_complete(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        let all = format!("cluster_size:{}\r\n", self.nodes.len());
        for node in &self.nodes {
            loop {
                let reply = node.command(["CLUSTER", "INFO"]).await?;
                let info = reply.text()?;
                if info.contains("cluster_state:ok") && info.contains(&all) {
                    break;
                }
                if Instant::now() > deadline {
                    bail!("the cluster is not complete after {TIMEOUT:?}: {info}");
                }
                sleep(POLL_INTERVAL).await;
            }
        }
        Ok(())
    }

    pub async fn flush_all(&self) -> anyhow::Result<()> {
        for node in &self.nodes {
            node.flush_all().await?;
        }
        Ok(())
    }

    /// Assigns slots and epochs and joins the nodes, as `redis-cli --cluster create` does.
    async fn join(&self) -> anyhow::Result<()> {
        let count = self.nodes.len();
        for (i, node) in self.nodes.iter().enumerate() {
            let (first, last) = (i * SLOTS / count, (i + 1) * SLOTS / count - 1);
            node.command(["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()])
                .await?;
            node.command(["CLUSTER", "SET-CONFIG-EPOCH", &(i + 1).to_string()]).await?;
        }
        let port = self.nodes[0].served_at().port().to_string();
        let bus = self.buses[0].number().to_string();
        for node in &self.nodes[1..] {
            node.command(["CLUSTER", "MEET", "127.0.0.1", &port, &bus]).await?;
        }
        Ok(())
    }
}
