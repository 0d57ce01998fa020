//! The configuration of `qpq-server`, from the same file and variables, for commands that need only
//! a part of it.

use std::{path::PathBuf, time::Duration};

use qpq_domain::Backoff;
use qpq_runtime::config::{
    About, Broken, ConfigError, Declared, Node, Problem, SettingReader, Settings, Sources,
    environment, load,
};
use qpq_server::{Config, FOREIGN_VARIABLES};
use qpq_store_cluster::ConnectError;
use rand::{RngCore as _, rngs::OsRng};
use tokio::time::{Instant, sleep};

use crate::print_note;

/// The location of the configuration.
#[derive(Debug, clap::Args)]
pub(crate) struct Location {
    /// The TOML file with the settings of the server or edges [env: QPQ_CONFIG].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The settings of an edge, of which only `postgres.url` is required.
#[derive(Debug, Default)]
pub(crate) struct ClusterSettings(Config);

impl Location {
    /// Loads the settings of a cluster.
    pub(crate) fn load(&self) -> Result<ClusterSettings, ConfigError> {
        Ok(load::<ClusterSettings>(self.sources())?.settings)
    }

    /// Loads the settings of a single node or a cluster.
    pub(crate) fn load_any(&self) -> Result<Config, ConfigError> {
        Ok(load::<AnySettings>(self.sources())?.settings.0)
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

impl ClusterSettings {
    /// Returns the settings of the cluster's database.
    pub(crate) fn database(
        &self,
        opaque_setup: [u8; 32],
    ) -> anyhow::Result<qpq_store_cluster::Config> {
        Ok(self.0.cluster_database(opaque_setup)?)
    }

    /// Returns the directory that all edges share.
    pub(crate) fn secrets_dir(&self) -> Result<PathBuf, ConfigError> {
        let missing = || Problem::RuleBroken {
            at: "default".into(),
            path: "cluster.secrets_dir".into(),
            must_be: "given: the directory that `qpq-admin init` created for the cluster".into(),
        };
        self.0.cluster.secrets_dir.clone().ok_or_else(|| ConfigError { problems: vec![missing()] })
    }
}

/// The settings of a single node or a cluster. None of them is required.
#[derive(Debug, Default)]
struct AnySettings(Config);

macro_rules! same_settings {
    ($($name:ident),*) => {$(
        impl Node for $name {
            fn describe(&self, about: About, declared: &mut Declared) {
                self.0.describe(about, declared);
            }

            fn read(&mut self, path: &str, reader: &mut SettingReader<'_>) {
                self.0.read(path, reader);
            }

            fn show(&self, path: &str, values: &mut Vec<(String, Option<String>)>) {
                self.0.show(path, values);
            }
        }
    )*};
}
same_settings!(ClusterSettings, AnySettings);

impl Settings for AnySettings {
    fn validate(&self) -> Vec<Broken> {
        self.0.broken_values()
    }
}

impl Settings for ClusterSettings {
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

/// Runs `connect` until Postgres is reachable or `timeout` has passed. Prints each new reason.
pub(crate) async fn connect_with_retry<T>(
    timeout: Duration,
    mut connect: impl AsyncFnMut() -> Result<T, ConnectError>,
) -> Result<T, ConnectError> {
    let deadline = Instant::now() + timeout;
    let backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut failures = 0;
    let mut printed = String::new();
    loop {
        match connect().await {
            Err(error @ ConnectError::Unreachable { .. }) if Instant::now() < deadline => {
                let reason = error.to_string();
                if reason != printed {
                    print_note(format_args!(
                        "{reason}. Retrying for up to {} s",
                        timeout.as_secs()
                    ));
                    printed = reason;
                }
                failures += 1;
                let wait = backoff.delay(failures, OsRng.next_u64());
                sleep(wait.min(deadline - Instant::now())).await;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<ClusterSettings, String> {
        let environment: Vec<(OsString, OsString)> =
            variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
        let sources = Sources { environment, foreign: FOREIGN_VARIABLES, ..Sources::default() };
        load::<ClusterSettings>(sources)
            .map(|loaded| loaded.settings)
            .map_err(|error| error.to_string())
    }

    const POSTGRES: (&str, &str) = ("QPQ_POSTGRES__URL", "postgres://qpq@localhost/qpq");

    #[test]
    fn settings_with_only_postgres_are_accepted() {
        let settings = read(&[POSTGRES, ("QPQ_REDIS__PASSWORD_FILE", "/not/here")]).unwrap();
        let database = settings.database([7; 32]).unwrap();
        assert_eq!((database.postgres.url.as_str(), database.opaque_setup), (POSTGRES.1, [7; 32]));
        assert!(settings.secrets_dir().unwrap_err().to_string().contains("qpq-admin init"));
        let settings = read(&[POSTGRES, ("QPQ_CLUSTER__SECRETS_DIR", "/shared")]).unwrap();
        assert_eq!(settings.secrets_dir().unwrap(), PathBuf::from("/shared"));
    }

    #[test]
    fn the_error_names_a_missing_or_invalid_setting() {
        let said = read(&[("QPQ_REDIS__URL", "redis://localhost")]).unwrap_err();
        assert!(said.contains("postgres.url must be given"), "{said}");
        let said = read(&[POSTGRES, ("QPQ_POSTGRES__CONNECTIONS", "1")]).unwrap_err();
        assert!(
            said.contains("QPQ_POSTGRES__CONNECTIONS: postgres.connections must be at least"),
            "{said}"
        );
        let said = read(&[POSTGRES, ("QPQ_POSTGRES__PASSWORT_FILE", "x")]).unwrap_err();
        assert!(said.contains("did you mean QPQ_POSTGRES__PASSWORD_FILE?"), "{said}");
        let settings = read(&[POSTGRES, ("QPQ_POSTGRES__PASSWORD_FILE", "/not/here")]).unwrap();
        assert!(settings.database([0; 32]).unwrap_err().to_string().contains("/not/here"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unreachable_server_is_retried_and_a_refusal_is_not() {
        let unreachable = || ConnectError::Unreachable {
            server: "Postgres",
            setting: "postgres.url",
            cause: "connection refused".into(),
        };
        let mut tries = 0;
        let connected = connect_with_retry(Duration::from_secs(60), async || {
            tries += 1;
            if tries < 8 { Err(unreachable()) } else { Ok(tries) }
        });
        assert_eq!(connected.await.unwrap(), 8);
        let begun = Instant::now();
        let failed =
            connect_with_retry(Duration::from_secs(60), async || Err::<(), _>(unreachable())).await;
        assert!(matches!(failed, Err(ConnectError::Unreachable { .. })));
        assert!(begun.elapsed() >= Duration::from_secs(60));
        let begun = Instant::now();
        let refused = connect_with_retry(Duration::from_secs(60), async || {
            Err::<(), _>(ConnectError::OtherCluster)
        })
        .await;
        assert!(matches!(refused, Err(ConnectError::OtherCluster)));
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
