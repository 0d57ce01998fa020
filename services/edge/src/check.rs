//! `qpq-server config check`: checks the files, keys and ports that the configuration names. Starts
//! nothing, connects to nothing and creates nothing.

use std::{
    fmt,
    net::{SocketAddr, TcpListener, UdpSocket},
    path::Path,
};

use nix::unistd::{AccessFlags, access};
use qpq_ports::{Clock as _, SystemClock};
use qpq_runtime::{
    config::ListenOn,
    data_dir::{
        DataDir, SecretFile,
        cluster::{AT_REST_KEYS, DELIVERY_KEY, OPAQUE_SETUP},
    },
};
use qpq_store_embedded::{
    Claim, DATABASE_FILE, LOCK_FILE, OpenError, RESTORING_FILE, TRANSFERRED_FILE,
};
use qpq_transport::Identity;

use crate::{
    Config, at_rest,
    certificate::{self, CertificateError, Found},
    compose::with_causes,
    config::Generate,
    secrets,
};

/// Remaining days of a certificate below which the report has a note.
const EXPIRY_DAYS: i64 = 30;

/// The findings of [`check`].
#[derive(Debug, Default)]
pub struct Report {
    /// The facts about a start with this configuration.
    facts: Vec<(&'static str, String)>,
    /// The facts that may surprise the operator.
    remarks: Vec<String>,
    /// Reasons why a start would fail.
    problems: Vec<String>,
}

impl Report {
    /// Returns the reasons why a start would fail.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    fn fact(&mut self, name: &'static str, text: impl fmt::Display) {
        self.facts.push((name, text.to_string()));
    }

    fn problem(&mut self, error: impl fmt::Display) {
        self.problems.push(error.to_string());
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the configuration is valid")?;
        for (name, text) in &self.facts {
            writeln!(f, "  {name:<12}  {text}")?;
        }
        self.remarks.iter().try_for_each(|remark| writeln!(f, "  note: {remark}"))
    }
}

/// Checks all files, keys and ports that `config` names.
pub fn check(config: &Config) -> Report {
    let mut report = Report::default();
    let state = if config.cluster_sections().secrets_dir().is_some() {
        check_cluster(config, &mut report);
        // Nothing on this machine distinguishes a running edge from another program.
        ServerState::Unknown
    } else {
        let state = check_data_dir(&config.data_dir, &mut report);
        check_certificate(config, &mut report);
        state
    };
    check_ports(config, state, &mut report);
    report
}

/// The state of a server with this configuration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ServerState {
    Running,
    Stopped,
    Unknown,
}

fn check_data_dir(path: &Path, report: &mut Report) -> ServerState {
    if !path.exists() {
        let ancestor =
            path.ancestors().skip(1).find(|path| path.as_os_str().is_empty() || path.exists());
        let ancestor = match ancestor {
            Some(path) if !path.as_os_str().is_empty() => path,
            _ => Path::new("."),
        };
        match writable(ancestor) {
            Ok(()) => report.fact("data in", format_args!("{}, to be created", path.display())),
            Err(why) => report.problem(format_args!(
                "the data directory {} cannot be created: {} {why}. Choose another one with \
                 --data-dir",
                path.display(),
                ancestor.display()
            )),
        }
        return ServerState::Stopped;
    }
    if let Err(why) = writable(path) {
        report.problem(format_args!(
            "the data directory {} {why}. Choose another one with --data-dir, or change its owner",
            path.display()
        ));
        return ServerState::Unknown;
    }
    report.fact("data in", format_args!("{}, writable", path.display()));
    if path.join(TRANSFERRED_FILE).exists() {
        report.problem(format_args!(
            "the data directory {}",
            OpenError::Transferred(path.to_owned())
        ));
    }
    if path.join(RESTORING_FILE).exists() {
        report
            .problem(format_args!("the data directory {}", OpenError::Restoring(path.to_owned())));
    }
    check_secrets(path, report);
    // Opening a missing lock file would create it.
    if !path.join(LOCK_FILE).exists() {
        return ServerState::Stopped;
    }
    match Claim::take(path) {
        Ok(_) => ServerState::Stopped,
        Err(OpenError::InUse(_)) => ServerState::Running,
        Err(error) => {
            report.problem(format_args!("the data directory {error}"));
            ServerState::Unknown
        }
    }
}

fn writable(path: &Path) -> Result<(), &'static str> {
    if !path.is_dir() {
        return Err("is not a directory");
    }
    access(path, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|_| "is not writable for this user")
}

fn check_secrets(path: &Path, report: &mut Report) {
    let has_database = path.join(DATABASE_FILE).exists();
    let dir = match DataDir::create(path) {
        Ok(dir) => dir,
        Err(error) => return report.problem(error),
    };
    for file in [OPAQUE_SETUP, DELIVERY_KEY] {
        match dir.read_secret(file) {
            Ok(None) if has_database => report.problem(lost(path, file)),
            Ok(_) => {}
            Err(error) => report.problem(error),
        }
    }
    // A missing file is an error only if something is sealed, which only a start checks.
    match dir.read_any(AT_REST_KEYS) {
        Ok(Some(file)) => {
            if let Err(error) = at_rest::parse(path.join(AT_REST_KEYS), &file) {
                report.problem(error);
            }
        }
        Ok(None) => {}
        Err(error) => report.problem(error),
    }
}

fn lost(path: &Path, file: SecretFile) -> String {
    format!(
        "{} is missing although there is a database. Restore it from a backup. {}",
        path.join(file.name).display(),
        file.if_lost
    )
}

fn check_certificate(config: &Config, report: &mut Report) {
    let (cert, key) = config.tls_files();
    match (certificate::look(config), config.tls.generate.0) {
        (Err(error), _) => report.problem(error),
        (Ok(Found::Both), _) => match Identity::load(&cert, &key) {
            Ok(identity) => describe(&identity, &cert, report),
            Err(error) => report.problem(CertificateError::from(error)),
        },
        (Ok(Found::Neither { .. }), Generate::Never) => {
            report.problem(CertificateError::Missing { cert, key });
        }
        (Ok(Found::Neither { is_named }), Generate::IfMissing) => {
            report.fact(
                "certificate",
                format_args!("{}, to be created, self-signed", cert.display()),
            );
            if is_named {
                report.remarks.push(format!(
                    "tls.cert or tls.key names a file that does not exist: a start creates a \
                     self-signed certificate at {} and its key at {}. With tls.generate = \
                     \"never\" the server does not start",
                    cert.display(),
                    key.display()
                ));
            }
        }
    }
}

fn describe(identity: &Identity, cert: &Path, report: &mut Report) {
    let now = SystemClock.now().0 / 1_000;
    let days = identity
        .not_after()
        .map(|end| (end - i64::try_from(now).unwrap_or(i64::MAX)).div_euclid(24 * 60 * 60));
    report.fact("certificate", format_args!("{}, matches its key", cert.display()));
    report.fact("fingerprint", identity.fingerprint());
    match days {
        Some(days) if days < 0 => report.remarks.push(format!(
            "the certificate expired {} days ago: clients that check its dates refuse to connect. \
             Renew it",
            -days
        )),
        Some(days) if days < EXPIRY_DAYS => {
            report.remarks.push(format!("the certificate expires in {days} days: renew it"));
        }
        _ => {}
    }
}

fn check_cluster(config: &Config, report: &mut Report) {
    let sections = config.cluster_sections();
    let dir = sections.secrets_dir().expect("it is a cluster");
    let opaque_fingerprint = match secrets::load_shared(dir) {
        Ok(shared) => {
            report.fact("cluster", format_args!("{} of {}", shared.cluster, dir.display()));
            if config.own_tls_files().is_none() {
                describe(&shared.certificates.identity(), dir, report);
            }
            if let Err(error) = at_rest::load_shared(dir) {
                report.problem(error);
            }
            shared.opaque_fingerprint
        }
        Err(error) => {
            report.problem(error);
            [0; 32]
        }
    };
    if let Some((cert, key)) = config.own_tls_files() {
        match Identity::load(&cert, &key) {
            Ok(identity) => describe(&identity, &cert, report),
            Err(error) => report.problem(CertificateError::from(error)),
        }
    }
    match sections.store(opaque_fingerprint, config.store_limits()) {
        Ok(store) => store.problems().iter().for_each(|error| report.problem(with_causes(error))),
        Err(error) => report.problem(error),
    }
}

fn check_ports(config: &Config, state: ServerState, report: &mut Report) {
    for address in config.transport().listen {
        let bound = UdpSocket::bind(address).map(drop);
        check_port("listening on", "UDP", "listen", address, bound, state, report);
    }
    if let ListenOn::At(address) = config.http.listen {
        let bound = TcpListener::bind(address).map(drop);
        check_port("health", "TCP", "http.listen", address, bound, state, report);
    }
}

fn check_port(
    name: &'static str,
    kind: &str,
    setting: &str,
    address: SocketAddr,
    bound: std::io::Result<()>,
    state: ServerState,
    report: &mut Report,
) {
    use std::io::ErrorKind::AddrInUse;
    match bound {
        Ok(()) => report.fact(name, format_args!("{address} ({kind}), free")),
        Err(error) if error.kind() == AddrInUse && state == ServerState::Running => {
            report.fact(name, format_args!("{address} ({kind}), in use while this server runs"));
        }
        Err(error) if error.kind() == AddrInUse && state == ServerState::Unknown => {
            report.fact(name, format_args!("{address} ({kind}), in use"));
            report.remarks.push(format!(
                "{kind} port {} is in use. If this edge is not running, choose another port with \
                 {setting}",
                address.port()
            ));
        }
        Err(error) => {
            report.problem(format_args!(
                "cannot listen on {kind} {address}: {error}. Change {setting}"
            ));
        }
    }
}
