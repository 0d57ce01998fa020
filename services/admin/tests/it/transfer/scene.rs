//! A single node with contents, an empty cluster, and the command that transfers the node.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use qpq_domain::StoreLimits;
use qpq_ports::transfer::Digests;
use qpq_runtime::data_dir::cluster::OPAQUE_SETUP;
use qpq_store_cluster::{ClusterStore, Config, Endpoint, Migrate, Timing};
use qpq_store_embedded::{EmbeddedStore, Export};
use qpq_test_services::{Nats, Postgres, Redis};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::content::{Amount, Content};
use crate::harness::{RunOutput, Workspace, run, run_with, text};

pub(crate) struct Scene {
    pub(crate) workspace: Workspace,
    /// The data directory of the single node.
    pub(crate) node: PathBuf,
    /// The shared directory of the cluster, created from the node.
    pub(crate) shared: PathBuf,
    pub(crate) postgres: Postgres,
    pub(crate) content: Content,
    pub(crate) random: StdRng,
}

impl Scene {
    pub(crate) async fn new(amount: Amount) -> Self {
        let seed = rand::random();
        // Printed so that a failure can be reproduced.
        io::stderr().write_all(format!("seed {seed}\n").as_bytes()).unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        // A single node has the same secrets as a cluster, in addition to its database.
        let (workspace, made) = Workspace::with_shared_dir();
        let node = workspace.path("node");
        fs::create_dir(&node).unwrap();
        for name in [
            "opaque-setup.bin",
            "delivery-key.bin",
            "at-rest-keys",
            "server-cert.der",
            "server-key.der",
        ] {
            fs::copy(made.join(name), node.join(name)).unwrap();
        }
        let store = embedded(&node).await;
        let content =
            Content::fill(&store.stores(), amount, StdRng::from_seed(random.r#gen())).await;
        store.close().await;
        let shared = workspace.path("cluster");
        run(&["init", "--out", text(&shared), "--from", text(&node)]);
        let scene = Self {
            workspace,
            node,
            shared,
            postgres: Postgres::start().await.unwrap(),
            content,
            random,
        };
        scene.migrate();
        scene
    }

    pub(crate) fn migrate(&self) {
        let end = self.run(&["migrate"]);
        assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
    }

    /// Copies a directory.
    pub(crate) fn copy(&self, of: &Path, name: &str) -> PathBuf {
        let copy = self.workspace.path(name);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(of).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
        copy
    }

    /// Runs a command with the settings of the cluster.
    pub(crate) fn run(&self, arguments: &[&str]) -> RunOutput {
        self.run_on(&self.postgres.url(), arguments)
    }

    /// Runs a command with another database.
    pub(crate) fn run_on(&self, url: &str, arguments: &[&str]) -> RunOutput {
        run_with(
            arguments,
            &[("QPQ_POSTGRES__URL", url), ("QPQ_CLUSTER__SECRETS_DIR", text(&self.shared))],
        )
    }

    /// Transfers the node to the cluster. Returns the output without the lines of progress, which
    /// depend on the speed of the machine.
    pub(crate) fn transfer_node(&self) -> RunOutput {
        let mut end = self.run(&["migrate-to-cluster", "--from", text(&self.node)]);
        let is_progress = |line: &str| line.ends_with("%)") || line.ends_with(" rows read");
        let lines = end.stderr.split_inclusive('\n');
        end.stderr = lines.filter(|line| !is_progress(line.trim_end())).collect();
        end
    }

    /// Asserts that a transfer fails and leaves no tables or mark. Returns its standard error.
    pub(crate) async fn failing_transfer(&self) -> String {
        let end = self.transfer_node();
        assert_eq!((end.code, end.stdout.as_str()), (Some(1), ""), "{end:?}");
        assert_eq!(
            self.sql("SELECT count(*) FROM pg_class WHERE relname LIKE 'import\\_%'").await,
            "0"
        );
        assert!(!self.is_marked());
        end.stderr
    }

    /// Starts a transfer of the node.
    pub(crate) fn start_transfer(&self) -> Child {
        Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
            .args(["migrate-to-cluster", "--from", text(&self.node)])
            .env_clear()
            .env("QPQ_POSTGRES__URL", self.postgres.url())
            .env("QPQ_CLUSTER__SECRETS_DIR", text(&self.shared))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    pub(crate) fn is_marked(&self) -> bool {
        self.node.join(qpq_store_embedded::TRANSFERRED_FILE).exists()
    }

    pub(crate) async fn sql(&self, sql: &str) -> String {
        self.postgres.sql(sql).await.unwrap()
    }

    /// Returns the row counts and hashes of the node.
    pub(crate) async fn digests(&self) -> Digests {
        Export::open(&self.node).await.unwrap().digests(|| {}).await.unwrap()
    }
}

/// The other stores of an edge: Redis and NATS.
pub(crate) struct Edge {
    redis: Redis,
    nats: Nats,
}

impl Edge {
    pub(crate) async fn servers() -> Self {
        Self { redis: Redis::start().await.unwrap(), nats: Nats::start().await.unwrap() }
    }

    pub(crate) async fn store(&self, scene: &Scene) -> ClusterStore {
        self.store_on(&scene.postgres, &scene.shared).await
    }

    /// Returns the store of an edge of the cluster with this database and shared directory.
    pub(crate) async fn store_on(&self, postgres: &Postgres, shared: &Path) -> ClusterStore {
        let endpoint = |url: String| Endpoint { url, password: None, ca: None };
        let setup = fs::read(shared.join("opaque-setup.bin")).unwrap();
        let config = Config {
            postgres: endpoint(postgres.url()),
            redis: endpoint(self.redis.url()),
            nats: endpoint(self.nats.url()),
            postgres_connections: 8,
            postgres_timeout: Duration::from_secs(20),
            redis_timeout: Duration::from_secs(20),
            start_timeout: Duration::from_secs(60),
            namespace: "transfer".into(),
            migrate: Migrate::Never,
            opaque_setup: OPAQUE_SETUP.fingerprint(&setup),
            limits: StoreLimits::default(),
            timing: Timing::default(),
            clocks: qpq_store_cluster::Clocks { edge: None, ..Default::default() },
            blobs: qpq_store_cluster::BlobPlaces::default(),
        };
        Box::pin(ClusterStore::connect(&config)).await.unwrap()
    }
}

pub(crate) async fn embedded(data_dir: &Path) -> EmbeddedStore {
    EmbeddedStore::open(data_dir, StoreLimits::default()).await.unwrap()
}
