//! `qpq-admin init`: creates the files that all edges of a new cluster share, as a directory or as
//! a Kubernetes Secret.
//!
//! Existing files are never overwritten. The file `cluster-id` is written last and marks a
//! directory as complete. A run completes the directory of an earlier run that was interrupted.
//! With `--if-missing` it also adds a file that a directory of an earlier release lacks.

mod contents;
mod directory;
mod kubernetes;

use std::path::PathBuf;

use contents::Contents;
use kubernetes::Name;

use crate::print;

/// The arguments of `init`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("where").required(true).args(["out", "kubernetes_secret"])))]
pub(crate) struct Args {
    /// The directory to create.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// With --out: do nothing, successfully, if the directory exists and is complete.
    #[arg(long, conflicts_with_all = ["kubernetes_secret", "from"])]
    if_missing: bool,
    /// Print a manifest of a Secret of this name instead. The output is the only copy: store it
    /// like passwords.
    #[arg(long, value_name = "NAME")]
    kubernetes_secret: Option<Name>,
    /// The Secret's namespace.
    #[arg(long, value_name = "NS", conflicts_with = "out")]
    namespace: Option<Name>,
    #[command(flatten)]
    sources: Sources,
}

/// The files to copy instead of creating them, and the names of a new certificate.
#[derive(Debug, clap::Args)]
struct Sources {
    /// The data directory of a single node whose accounts the cluster will have. Its OPAQUE setup,
    /// delivery key and certificate are copied.
    #[arg(long, value_name = "DATA_DIR")]
    from: Option<PathBuf>,
    /// The cluster's domain: the part after the `@` in its users' addresses.
    #[arg(
        long,
        value_name = "D",
        env = "QPQ_DOMAIN",
        default_value = "localhost",
        value_parser = domain
    )]
    domain: String,
    /// Further names and IP addresses in a new certificate, in addition to the domain and
    /// `localhost`.
    #[arg(
        long = "name",
        value_name = "N",
        env = "QPQ_TLS__NAMES",
        value_delimiter = ',',
        num_args = 1..
    )]
    names: Vec<String>,
    /// A certificate chain to copy instead of creating one, in DER or PEM.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, in DER or PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl Sources {
    /// Returns the names of a new certificate, the same ones as `qpq-server` uses.
    fn certificate_names(&self) -> Vec<String> {
        let others = self.names.iter().filter(|name| !name.is_empty());
        qpq_server::certificate_names(&self.domain, others)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(out) = &args.out {
        return in_directory(out, args);
    }
    let contents = Contents::gather(&args.sources)?;
    let name = args.kubernetes_secret.as_ref().expect("clap requires one of the two");
    print(kubernetes::manifest(name, args.namespace.as_ref(), &contents))
}

fn in_directory(out: &std::path::Path, args: &Args) -> anyhow::Result<()> {
    if args.if_missing && directory::is_complete(out) {
        // The directory may be of a release without this file.
        qpq_server::add_at_rest_keys(out)?;
        let summary = directory::verify(out)?;
        return print(format_args!("{} already exists\n{summary}", out.display()));
    }
    directory::prepare(out)?;
    let summary = directory::write(out, &Contents::gather(&args.sources)?)?;
    print(format_args!(
        "created {dir}, which all edges of the cluster share\n{summary}\n\
         Keep a copy of {dir} in a safe place: without it no account can log in again.\n\
         Copy all of it to every edge, readable by the edge's user only, and name it in \
         QPQ_CLUSTER__SECRETS_DIR.\n\
         Rotate the ticket keys every 6 hours: set cluster.rotate_ticket_keys to 6h on edges that \
         share {dir}, or run `qpq-admin rotate-ticket-keys --dir {dir}`.\n",
        dir = out.display()
    ))
}

fn domain(text: &str) -> Result<String, String> {
    let is_plain = text
        .chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-'));
    if is_plain && !text.is_empty() {
        Ok(text.to_owned())
    } else {
        Err("must be a domain name in lower case, as in example.org".to_owned())
    }
}
