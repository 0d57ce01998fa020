//! What a person sees who starts the server: where it is, and what to type next.

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
                "  certificate   self-signed, created now at {}: no file was there",
                cert.display()
            )?;
        }
        writeln!(f, "\nTwo people can chat now; type in other terminals:")?;
        writeln!(f, "  {client} -p alice register alice --server {server} --pin {fingerprint}")?;
        writeln!(f, "  {client} -p bob   register bob   --server {server} --pin {fingerprint}")?;
        writeln!(
            f,
            "  {client} -p alice dm bob        # and in another terminal: {client} -p bob dm alice"
        )
    }
}

/// How `qpq` is called from here: by its path if it sits beside this program and is not found
/// without, else by its name.
fn client() -> String {
    let name = "qpq".to_owned();
    let beside = env::current_exe()
        .ok()
        .map(|program| program.with_file_name(&name))
        .filter(|path| path.is_file());
    let Some(beside) = beside else { return name };
    let searched = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&searched).any(|dir| dir.join(&name).is_file()) {
        return name;
    }
    let here = env::current_dir().unwrap_or_default();
    let path =
        beside.strip_prefix(&here).map(|inside| Path::new(".").join(inside)).unwrap_or(beside);
    path.display().to_string()
}
