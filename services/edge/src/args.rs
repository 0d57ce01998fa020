//! The command line. It stays thin: flags are one more layer of the configuration, so values are
//! checked there.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use qpq_runtime::config::{ConfigError, Flag, Loaded, Sources, environment, load};

use crate::{Config, FOREIGN_VARIABLES};

/// The quicproquo server: end-to-end encrypted messages over QUIC.
///
/// Without a command it runs. Everything it keeps is in the data directory; whatever is missing
/// there is made at the first start. All settings, also as environment variables:
/// docs/configuration.md.
#[derive(Clone, Debug, Parser)]
#[command(name = "qpq-server", version, max_term_width = 100)]
pub struct Args {
    /// The UDP addresses that clients connect to, `[::]:PORT` for IPv6 and IPv4; may be repeated
    /// [default: 0.0.0.0:5001].
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    listen: Vec<String>,
    /// The directory that holds everything [default: data].
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

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run the server (the default).
    #[default]
    Run,
    /// Look at the configuration without starting anything.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// What to do with the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum ConfigCommand {
    /// Say whether a server can start from the configuration, and if not, why: settings, and the
    /// files, keys and ports that they name. Changes nothing.
    Check,
    /// Print the settings in force as a TOML file, with their origins, without secrets.
    Show,
}

impl Args {
    /// What to do; to run the server where nothing was said.
    pub fn task(&self) -> Command {
        self.command.clone().unwrap_or_default()
    }

    /// The configuration from all layers, these flags on top.
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
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_and_declaration_agree() {
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
