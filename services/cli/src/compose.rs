//! The context of every command, built from the command line and the environment in one place.

use std::{env, ffi::OsString, path::PathBuf};

use qpq_client::{Options, Profile, Trust};
use zeroize::Zeroizing;

use crate::{
    args::{Global, Pins, ProfileName, TrustArgs},
    error::CliError,
    output::{Format, Output},
    password::Source,
    progress::Progress,
    unlock::Keyring,
};

/// Settings of the environment that the command line does not read itself.
#[derive(Default)]
pub(crate) struct Environment {
    pub(crate) password: Option<Zeroizing<String>>,
    pub(crate) runtime_dir: Option<OsString>,
    pub(crate) data_home: Option<PathBuf>,
    pub(crate) user_home: Option<PathBuf>,
    /// The server of new accounts.
    pub(crate) server: Option<String>,
    pub(crate) no_color: bool,
}

impl Environment {
    /// Reads the environment of the process.
    pub(crate) fn read() -> Result<Self, CliError> {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let password = set("QPQ_PASSWORD")
            .map(|password| {
                password.into_string().map_err(|_| CliError::usage("QPQ_PASSWORD is not UTF-8"))
            })
            .transpose()?;
        Ok(Self {
            password: password.map(Zeroizing::new),
            runtime_dir: set("XDG_RUNTIME_DIR"),
            data_home: set("XDG_DATA_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute()),
            user_home: set("HOME").map(PathBuf::from),
            server: set("QPQ_SERVER").and_then(|server| server.into_string().ok()),
            no_color: set("NO_COLOR").is_some(),
        })
    }
}

/// The context of a command.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) output: Output,
    pub(crate) progress: Progress,
    pub(crate) password: Source,
    pub(crate) keyring: Keyring,
    pub(crate) profile: ProfileName,
    profiles: PathBuf,
    server: Option<String>,
    default_server: Option<String>,
    trust: Option<Trust>,
}

impl Context {
    pub(crate) fn new(global: Global, environment: Environment) -> Result<Self, CliError> {
        let format = if global.json { Format::Json } else { Format::Human };
        let password = match (global.password_file, environment.password) {
            (Some(path), _) => Source::File(path),
            (None, Some(password)) => Source::Environment(password),
            (None, None) => Source::Terminal,
        };
        let data_home =
            environment.data_home.or(environment.user_home.map(|home| home.join(".local/share")));
        let home = global.home.or(data_home.map(|dir| dir.join("qpq"))).ok_or_else(|| {
            CliError::usage("there is no home directory to keep profiles in")
                .hint("name one with --home")
        })?;
        Ok(Self {
            output: Output::new(format, environment.no_color),
            progress: Progress::new(format),
            password,
            keyring: Keyring::find(environment.runtime_dir.as_deref()),
            profile: global.profile,
            profiles: home.join("profiles"),
            server: global.server,
            default_server: environment.server,
            trust: trust(global.trust),
        })
    }

    /// Returns the directory of all profiles, each in a directory of its name.
    pub(crate) fn profiles(&self) -> &std::path::Path {
        &self.profiles
    }

    /// Returns the directory of the chosen profile.
    pub(crate) fn dir(&self) -> PathBuf {
        self.profiles.join(self.profile.as_str())
    }

    /// Returns the connection options for a profile that is yet to be created.
    pub(crate) fn fresh_options(&self) -> Result<Options, CliError> {
        let server =
            self.server.clone().or_else(|| self.default_server.clone()).ok_or_else(|| {
                CliError::usage("which server?")
                    .hint("name it with --server HOST:PORT or QPQ_SERVER")
            })?;
        Ok(Options::new(server, self.trust.clone().unwrap_or(Trust::FirstUse)))
    }

    /// Returns the server that the command line names.
    pub(crate) fn named_server(&self) -> Option<&String> {
        self.server.as_ref()
    }

    /// Returns the proof of the server's identity that the command line names.
    pub(crate) fn named_trust(&self) -> Option<&Trust> {
        self.trust.as_ref()
    }

    /// Returns the connection options for the named server or, without one, for the profile's.
    pub(crate) fn any_options(&self) -> Result<Options, CliError> {
        match Profile::read(&self.dir()) {
            Ok(profile) if self.server.as_ref().is_none_or(|server| *server == profile.server) => {
                Ok(self.options(&profile))
            }
            _ => self.fresh_options(),
        }
    }

    /// Returns the connection options of the profile, with those of the command line in their
    /// place.
    pub(crate) fn options(&self, profile: &Profile) -> Options {
        let mut options = profile.options();
        if let Some(server) = &self.server {
            options.server.clone_from(server);
        }
        if let Some(trust) = &self.trust {
            options.trust = trust.clone();
        }
        options
    }
}

fn trust(args: TrustArgs) -> Option<Trust> {
    match args {
        TrustArgs { pin: Some(Pins::One(fingerprint)), .. } => Some(Trust::Pinned(fingerprint)),
        TrustArgs { pin: Some(Pins::Either(fingerprints)), .. } => {
            Some(Trust::PinnedEither(fingerprints))
        }
        TrustArgs { ca: Some(file), .. } => Some(Trust::Authority(file)),
        TrustArgs { system_roots: true, .. } => Some(Trust::System),
        TrustArgs { .. } => None,
    }
}
