//! The text printed when the server is ready: addresses, and the commands to try next.

use std::{
    env, fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use crate::{Config, Running, probe::reachable};

/// The lines printed at the start.
#[derive(Debug)]
pub struct Banner {
    listening: Vec<SocketAddr>,
    http: Option<SocketAddr>,
    data_dir: PathBuf,
    fingerprint: String,
    certificate_created: Option<PathBuf>,
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
            client: client(),
        }
    }
}

impl fmt::Display for Banner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { listening, http, data_dir, fingerprint, certificate_created, client } = self;
        let server = reachable(listening[0]);
        let listening: Vec<_> = listening.iter().map(SocketAddr::to_string).collect();
        writeln!(f, "qpq-server {} is ready", env!("CARGO_PKG_VERSION"))?;
        writeln!(f, "  listening on  {} (UDP)", listening.join(", "))?;
        if let Some(http) = http {
            writeln!(f, "  health        http://{http}/livez /readyz /metrics")?;
        }
        writeln!(f, "  data in       {}", data_dir.display())?;
        writeln!(f, "  fingerprint   {fingerprint}")?;
        if let Some(cert) = certificate_created {
            writeln!(
                f,
                "  certificate   self-signed, created now at {}: the file did not exist",
                cert.display()
            )?;
        }
        writeln!(f, "\nTwo people can chat now. Type in other terminals:")?;
        writeln!(f, "  {client} -p alice register alice --server {server} --pin {fingerprint}")?;
        writeln!(f, "  {client} -p bob   register bob   --server {server} --pin {fingerprint}")?;
        writeln!(
            f,
            "  {client} -p alice dm bob        # and in another terminal: {client} -p bob dm alice"
        )
    }
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
