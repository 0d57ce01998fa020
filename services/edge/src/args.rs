//! The command line. Flags are one more layer of the configuration, which checks their values.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use qpq_runtime::config::{ConfigError, Flag, Loaded, Sources, environment, load};

use crate::{Config, FOREIGN_VARIABLES};

/// The quicproquo server: end-to-end encrypted messages over QUIC.
///
/// Without a command the server runs. All of its state is in the data directory, which the first
/// start creates. docs/configuration.md lists all settings and their environment variables.
#[derive(Clone, Debug, Parser)]
#[command(name = "qpq-server", version, max_term_width = 100)]
pub struct Args {
    /// The UDP addresses that clients connect to, `[::]:PORT` for IPv6 and IPv4. May be repeated
    /// [default: 0.0.0.0:5001].
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    listen: Vec<String>,
    /// The directory of the database, the keys and the certificate [default: data].
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<String>,
    /// The certificate chain, in DER or PEM [default: server-cert.der in the data directory].
    #[arg(long, global = true, value_name = "FILE")]
    tls_cert: Option<String>,
    /// The certificate's private key, in DER or PEM [default: server-key.der in the data
    /// directory].
    #[arg(long, global = true, value_name = "FILE")]
    tls_key: Option<String>,
    /// A TOML file with settings [env: QPQ_CONFIG].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

/// A command of `qpq-server`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run the server (the default).
    #[default]
    Run,
    /// Check or print the configuration without starting the server.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// A command of `qpq-server config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum ConfigCommand {
    /// Check whether a server can start from the configuration: the settings, and the files, keys
    /// and ports that they name. Changes nothing.
    Check,
    /// Print the effective settings as a TOML file, with their origins, without secrets.
    Show,
}

impl Args {
    /// Returns the command, [`Command::Run`] by default.
    pub fn task(&self) -> Command {
        self.command.clone().unwrap_or_default()
    }

    /// Loads the configuration from all layers. These flags take precedence.
    pub fn load(&self) -> Result<Loaded<Config>, ConfigError> {
        let listen = (!self.listen.is_empty()).then(|| self.listen.join(","));
        let flags = [
            ("--listen", "listen", &listen),
            ("--data-dir", "data_dir", &self.data_dir),
            ("--tls-cert", "tls.cert", &self.tls_cert),
            ("--tls-key", "tls.key", &self.tls_key),
        ];
        let flag = |(name, path, value): (_, _, &Option<String>)| {
            Some(Flag { name, path, value: value.clone()? })
        };
        load(Sources {
            file: self.config.clone(),
            environment: environment(),
            flags: flags.into_iter().filter_map(flag).collect(),
            foreign: FOREIGN_VARIABLES,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use qpq_runtime::config::Declared;

    use super::*;

    #[test]
    fn clap_accepts_the_definition_of_the_flags() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_flag_is_declared_as_a_setting() {
        let mut declared: Vec<_> = Declared::of::<Config>()
            .settings
            .into_iter()
            .filter_map(|setting| setting.flag)
            .collect();
        let command = Args::command();
        let mut typed: Vec<_> = command
            .get_arguments()
            .filter_map(|argument| argument.get_long())
            .filter(|name| !["config", "help", "version"].contains(name))
            .map(|name| format!("--{name}"))
            .collect();
        declared.sort_unstable();
        typed.sort_unstable();
        assert_eq!(declared, typed);
    }
}
