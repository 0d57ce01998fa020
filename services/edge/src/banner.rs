//! The text printed when the server is ready: addresses, and the commands to try next.

use std::{
    env, fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use qpq_domain::Username;
use qpq_rpc::RegistrationMode;

use crate::{Config, Running, probe::reachable};

/// The lines printed at the start.
#[derive(Debug)]
pub struct Banner {
    listening: Vec<SocketAddr>,
    http: Option<SocketAddr>,
    data_dir: PathBuf,
    fingerprint: String,
    certificate_created: Option<PathBuf>,
    registration: RegistrationMode,
    unregistered_admins: Vec<Username>,
    /// The command that creates an invite.
    invite: String,
    client: String,
}

impl Banner {
    /// Describes a server that has started.
    pub fn new(running: &Running, config: &Config) -> Self {
        Self {
            listening: running.local_addrs().to_vec(),
            http: running.http_addr(),
            data_dir: config.data_dir.canonicalize().unwrap_or_else(|_| config.data_dir.clone()),
            fingerprint: running.fingerprint().to_string(),
            certificate_created: running.certificate_created().map(Path::to_owned),
            registration: config.auth.registration.0,
            unregistered_admins: running.unregistered_admins().to_vec(),
            invite: invite(config),
            client: client(),
        }
    }
}

impl fmt::Display for Banner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { listening, http, data_dir, fingerprint, client, .. } = self;
        let server = reachable(listening[0]);
        let option =
            if self.registration == RegistrationMode::Invite { " --invite CODE" } else { "" };
        let listening = listening.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ");
        writeln!(f, "qpq-server {} is ready", env!("CARGO_PKG_VERSION"))?;
        writeln!(f, "  listening on  {listening} (UDP)")?;
        if let Some(http) = http {
            writeln!(f, "  health        http://{http}/livez /readyz /metrics")?;
        }
        writeln!(f, "  data in       {}", data_dir.display())?;
        writeln!(f, "  fingerprint   {fingerprint}")?;
        self.write_registration(f, &listening)?;
        if let Some(cert) = &self.certificate_created {
            writeln!(
                f,
                "  certificate   self-signed, created now at {}: the file did not exist",
                cert.display()
            )?;
        }
        if self.registration == RegistrationMode::Closed {
            return Ok(());
        }
        writeln!(f, "\nTwo people can chat now. Type in other terminals:")?;
        writeln!(
            f,
            "  {client} -p alice register alice --server {server} --pin {fingerprint}{option}"
        )?;
        writeln!(
            f,
            "  {client} -p bob   register bob   --server {server} --pin {fingerprint}{option}"
        )?;
        writeln!(
            f,
            "  {client} -p alice dm bob        # and in another terminal: {client} -p bob dm alice"
        )
    }
}

impl Banner {
    /// Writes who may register, and where.
    fn write_registration(&self, f: &mut fmt::Formatter<'_>, listening: &str) -> fmt::Result {
        let Self { invite, .. } = self;
        match self.registration {
            RegistrationMode::Open => writeln!(
                f,
                "  registration  open: everyone who reaches {listening} can create an account"
            )?,
            RegistrationMode::Invite => writeln!(
                f,
                "  registration  with an invite, at {listening}. Create one with: {invite}"
            )?,
            RegistrationMode::Closed => {
                writeln!(f, "  registration  closed: nobody can create an account")?;
            }
        }
        let instead = match self.registration {
            RegistrationMode::Closed => "set auth.registration = \"invite\", then",
            RegistrationMode::Open | RegistrationMode::Invite => "needs an invite:",
        };
        self.unregistered_admins.iter().try_for_each(|admin| {
            writeln!(
                f,
                "  administrator {admin} has no account, {instead} {invite} --username {admin}"
            )
        })
    }
}

/// Returns the command that creates an invite for this server.
fn invite(config: &Config) -> String {
    let command = "qpq-admin invite create";
    if config.cluster_sections().secrets_dir().is_some() {
        return command.to_owned();
    }
    format!("{command} --data-dir {}", config.data_dir.display())
}

/// Returns the command that starts `qpq`: its path if it is in the directory of this program and
/// not in `PATH`, otherwise its name.
fn client() -> String {
    let name = "qpq".to_owned();
    let sibling = env::current_exe()
        .ok()
        .map(|program| program.with_file_name(&name))
        .filter(|path| path.is_file());
    let Some(sibling) = sibling else { return name };
    let searched = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&searched).any(|dir| dir.join(&name).is_file()) {
        return name;
    }
    let here = env::current_dir().unwrap_or_default();
    let path =
        sibling.strip_prefix(&here).map(|inside| Path::new(".").join(inside)).unwrap_or(sibling);
    path.display().to_string()
}
