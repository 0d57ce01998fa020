//! The configuration as `qpq-server` has it, same file and same variables, for commands that need a
//! cluster's Postgres and little else of it.

use std::{path::PathBuf, time::Duration};

use qpq_domain::Backoff;
use qpq_runtime::config::{
    About, Broken, ConfigError, Declared, Node, Problem, Reader, Settings, Sources, environment,
    load,
};
use qpq_server::{Config, FOREIGN_VARIABLES};
use qpq_store_cluster::ConnectError;
use rand::{RngCore as _, rngs::OsRng};
use tokio::time::{Instant, sleep};

use crate::note;

/// Where the configuration is.
#[derive(Debug, clap::Args)]
pub(crate) struct Location {
    /// The TOML file with settings that the edges have [env: QPQ_CONFIG].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// An edge's settings, of which only Postgres must be there.
#[derive(Debug, Default)]
pub(crate) struct Given(Config);

impl Location {
    /// The settings from all layers.
    pub(crate) fn load(&self) -> Result<Given, ConfigError> {
        Ok(load::<Given>(self.sources())?.settings)
    }

    /// The settings of a single server or of an edge.
    pub(crate) fn load_any(&self) -> Result<Config, ConfigError> {
        Ok(load::<Any>(self.sources())?.settings.0)
    }

    fn sources(&self) -> Sources {
        Sources {
            file: self.config.clone(),
            environment: environment(),
            flags: Vec::new(),
            foreign: FOREIGN_VARIABLES,
        }
    }
}

impl Given {
    /// The cluster's database.
    pub(crate) fn database(
        &self,
        opaque_setup: [u8; 32],
    ) -> anyhow::Result<qpq_store_cluster::Config> {
        Ok(self.0.cluster_database(opaque_setup)?)
    }

    /// The directory that all edges share.
    pub(crate) fn secrets_dir(&self) -> Result<PathBuf, ConfigError> {
        let missing = || Problem::Broken {
            at: "default".into(),
            path: "cluster.secrets_dir".into(),
            must_be: "given: the directory that `qpq-admin init` made for the cluster".into(),
        };
        self.0.cluster.secrets_dir.clone().ok_or_else(|| ConfigError { problems: vec![missing()] })
    }
}

/// Settings of which none must be there.
#[derive(Debug, Default)]
struct Any(Config);

macro_rules! same_settings {
    ($($name:ident),*) => {$(
        impl Node for $name {
            fn describe(&self, about: About, declared: &mut Declared) {
                self.0.describe(about, declared);
            }

            fn read(&mut self, path: &str, reader: &mut Reader<'_>) {
                self.0.read(path, reader);
            }

            fn show(&self, path: &str, values: &mut Vec<(String, Option<String>)>) {
                self.0.show(path, values);
            }
        }
    )*};
}
same_settings!(Given, Any);

impl Settings for Any {
    fn validate(&self) -> Vec<Broken> {
        self.0.broken_values()
    }
}

impl Settings for Given {
    fn validate(&self) -> Vec<Broken> {
        let mut broken = self.0.broken_values();
        if self.0.postgres.url.is_none() {
            let must_be =
                "given: the cluster's database, as in postgres://qpq@db.example.org:5432/qpq";
            broken.push(Broken { path: "postgres.url", must_be: must_be.into() });
        }
        broken
    }
}

/// Tries until Postgres is there, or `patience` is at its end; says what it waits for.
pub(crate) async fn patiently<T>(
    patience: Duration,
    mut connect: impl AsyncFnMut() -> Result<T, ConnectError>,
) -> Result<T, ConnectError> {
    let until = Instant::now() + patience;
    let backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut failures = 0;
    let mut said = String::new();
    loop {
        match connect().await {
            Err(error @ ConnectError::Unreachable { .. }) if Instant::now() < until => {
                let reason = error.to_string();
                if reason != said {
                    note(format_args!("{reason}. Waiting for it"));
                    said = reason;
                }
                failures += 1;
                let wait = backoff.delay(failures, OsRng.next_u64());
                sleep(wait.min(until - Instant::now())).await;
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Given, String> {
        let environment: Vec<(OsString, OsString)> =
            variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
        let sources = Sources { environment, foreign: FOREIGN_VARIABLES, ..Sources::default() };
        load::<Given>(sources).map(|loaded| loaded.settings).map_err(|error| error.to_string())
    }

    const POSTGRES: (&str, &str) = ("QPQ_POSTGRES__URL", "postgres://qpq@localhost/qpq");

    #[test]
    fn postgres_alone_is_enough() {
        let given = read(&[POSTGRES, ("QPQ_REDIS__PASSWORD_FILE", "/not/here")]).unwrap();
        let database = given.database([7; 32]).unwrap();
        assert_eq!((database.postgres.url.as_str(), database.opaque_setup), (POSTGRES.1, [7; 32]));
        assert!(given.secrets_dir().unwrap_err().to_string().contains("qpq-admin init"));
        let given = read(&[POSTGRES, ("QPQ_CLUSTER__SECRETS_DIR", "/fleet")]).unwrap();
        assert_eq!(given.secrets_dir().unwrap(), PathBuf::from("/fleet"));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let said = read(&[("QPQ_REDIS__URL", "redis://localhost")]).unwrap_err();
        assert!(said.contains("postgres.url must be given"), "{said}");
        let said = read(&[POSTGRES, ("QPQ_POSTGRES__CONNECTIONS", "1")]).unwrap_err();
        assert!(
            said.contains("QPQ_POSTGRES__CONNECTIONS: postgres.connections must be at least"),
            "{said}"
        );
        let said = read(&[POSTGRES, ("QPQ_POSTGRES__PASSWORT_FILE", "x")]).unwrap_err();
        assert!(said.contains("did you mean QPQ_POSTGRES__PASSWORD_FILE?"), "{said}");
        let given = read(&[POSTGRES, ("QPQ_POSTGRES__PASSWORD_FILE", "/not/here")]).unwrap();
        assert!(given.database([0; 32]).unwrap_err().to_string().contains("/not/here"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_starting_is_waited_for_and_one_that_refuses_is_not() {
        let unreachable = || ConnectError::Unreachable {
            server: "Postgres",
            setting: "postgres.url",
            cause: "connection refused".into(),
        };
        let mut tries = 0;
        let connected = patiently(Duration::from_secs(60), async || {
            tries += 1;
            if tries < 8 { Err(unreachable()) } else { Ok(tries) }
        });
        assert_eq!(connected.await.unwrap(), 8);
        let begun = Instant::now();
        let gone = patiently(Duration::from_secs(60), async || Err::<(), _>(unreachable())).await;
        assert!(matches!(gone, Err(ConnectError::Unreachable { .. })));
        assert!(begun.elapsed() >= Duration::from_secs(60));
        let begun = Instant::now();
        let other =
            patiently(Duration::from_secs(60), async || Err::<(), _>(ConnectError::OtherCluster))
                .await;
        assert!(matches!(other, Err(ConnectError::OtherCluster)));
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
