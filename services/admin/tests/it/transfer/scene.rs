//! A node with something in it, a cluster with nothing, and the program between them.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use qpq_ports::transfer::Digests;
use qpq_runtime::data_dir::cluster::OPAQUE_SETUP;
use qpq_store_cluster::{ClusterStore, Config, Endpoint, Migrate, Timing};
use qpq_store_embedded::{EmbeddedStore, Export, Limits};
use qpq_test_services::{Nats, Postgres, Redis};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::content::{Amount, Content};
use crate::harness::{End, Place, run, run_with, text};

pub(crate) struct Scene {
    pub(crate) place: Place,
    /// The data directory of a server that ran alone.
    pub(crate) node: PathBuf,
    /// The directory of the cluster that was made from it.
    pub(crate) fleet: PathBuf,
    pub(crate) postgres: Postgres,
    pub(crate) content: Content,
    pub(crate) random: StdRng,
}

impl Scene {
    pub(crate) async fn new(amount: Amount) -> Self {
        let seed = rand::random();
        // For whoever wants to see a failure again.
        io::stderr().write_all(format!("seed {seed}\n").as_bytes()).unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        // What a server keeps beside its database is what a cluster shares.
        let (place, made) = Place::with_fleet();
        let node = place.path("node");
        fs::create_dir(&node).unwrap();
        for name in ["opaque-setup.bin", "delivery-key.bin", "server-cert.der", "server-key.der"] {
            fs::copy(made.join(name), node.join(name)).unwrap();
        }
        let store = embedded(&node).await;
        let content =
            Content::fill(&store.stores(), amount, StdRng::from_seed(random.r#gen())).await;
        store.close().await;
        let fleet = place.path("cluster");
        run(&["init", "--out", text(&fleet), "--from", text(&node)]);
        let scene = Self {
            place,
            node,
            fleet,
            postgres: Postgres::start().await.unwrap(),
            content,
            random,
        };
        scene.migrate();
        scene
    }

    pub(crate) fn migrate(&self) {
        let end = self.run(&["migrate"]);
        assert_eq!((end.code, end.said.as_str()), (Some(0), ""), "{end:?}");
    }

    /// Another copy of a directory.
    pub(crate) fn copy(&self, of: &Path, name: &str) -> PathBuf {
        let copy = self.place.path(name);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(of).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
        copy
    }

    /// Runs a command with the cluster's settings.
    pub(crate) fn run(&self, arguments: &[&str]) -> End {
        self.run_on(&self.postgres.url(), arguments)
    }

    /// The same on another database.
    pub(crate) fn run_on(&self, url: &str, arguments: &[&str]) -> End {
        run_with(
            arguments,
            &[("QPQ_POSTGRES__URL", url), ("QPQ_CLUSTER__SECRETS_DIR", text(&self.fleet))],
        )
    }

    /// Moves the node.
    pub(crate) fn move_node(&self) -> End {
        self.run(&["migrate-to-cluster", "--from", text(&self.node)])
    }

    /// What is said when moving it is refused, which leaves nothing behind.
    pub(crate) async fn refused(&self) -> String {
        let end = self.move_node();
        assert_eq!((end.code, end.printed.as_str()), (Some(1), ""), "{end:?}");
        assert_eq!(
            self.sql("SELECT count(*) FROM pg_class WHERE relname LIKE 'import\\_%'").await,
            "0"
        );
        assert!(!self.is_marked());
        end.said
    }

    /// Begins to move the node.
    pub(crate) fn start_moving(&self) -> Child {
        Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
            .args(["migrate-to-cluster", "--from", text(&self.node)])
            .env_clear()
            .env("QPQ_POSTGRES__URL", self.postgres.url())
            .env("QPQ_CLUSTER__SECRETS_DIR", text(&self.fleet))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    pub(crate) fn is_marked(&self) -> bool {
        self.node.join(qpq_store_embedded::MOVED_FILE).exists()
    }

    pub(crate) async fn sql(&self, sql: &str) -> String {
        self.postgres.sql(sql).await.unwrap()
    }

    /// What the node's content comes to.
    pub(crate) async fn digests(&self) -> Digests {
        Export::open(&self.node).await.unwrap().digests(|| {}).await.unwrap()
    }
}

/// An edge's two other servers.
pub(crate) struct Edge {
    redis: Redis,
    nats: Nats,
}

impl Edge {
    pub(crate) async fn servers() -> Self {
        Self { redis: Redis::start().await.unwrap(), nats: Nats::start().await.unwrap() }
    }

    pub(crate) async fn store(&self, scene: &Scene) -> ClusterStore {
        let endpoint = |url: String| Endpoint { url, password: None, ca: None };
        let setup = fs::read(scene.fleet.join("opaque-setup.bin")).unwrap();
        let config = Config {
            postgres: endpoint(scene.postgres.url()),
            redis: endpoint(self.redis.url()),
            nats: endpoint(self.nats.url()),
            postgres_connections: 8,
            postgres_timeout: Duration::from_secs(20),
            redis_timeout: Duration::from_secs(20),
            start_timeout: Duration::from_secs(60),
            namespace: "moving".into(),
            migrate: Migrate::Never,
            opaque_setup: OPAQUE_SETUP.fingerprint(&setup),
            limits: qpq_store_cluster::Limits::default(),
            timing: Timing::default(),
            clocks: qpq_store_cluster::Clocks { edge: None, ..Default::default() },
        };
        Box::pin(ClusterStore::connect(&config)).await.unwrap()
    }
}

pub(crate) async fn embedded(data_dir: &Path) -> EmbeddedStore {
    EmbeddedStore::open(data_dir, Limits::default()).await.unwrap()
}
