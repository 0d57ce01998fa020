//! `qpq-admin init`: makes what all edges of a new cluster share, as a directory or as a Kubernetes
//! Secret.
//!
//! Nothing that is there is ever overwritten. A directory is finished by its `cluster-id`, which is
//! written last; what a run left behind that was stopped before, the next one completes.

mod contents;
mod directory;
mod kubernetes;

use std::path::PathBuf;

use contents::Contents;
use kubernetes::Name;

use crate::say;

/// Where it is to be made, and from what.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("where").required(true).args(["out", "kubernetes_secret"])))]
pub(crate) struct Args {
    /// The directory to make.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// With --out: do nothing, successfully, if the directory is there and whole.
    #[arg(long, conflicts_with_all = ["kubernetes_secret", "from"])]
    if_missing: bool,
    /// Print a manifest of a Secret of this name instead. It is the only copy: keep it as you keep
    /// passwords.
    #[arg(long, value_name = "NAME")]
    kubernetes_secret: Option<Name>,
    /// The Secret's namespace.
    #[arg(long, value_name = "NS", conflicts_with = "out")]
    namespace: Option<Name>,
    #[command(flatten)]
    given: Given,
}

/// What is not to be made but taken, and what a certificate is made for.
#[derive(Debug, clap::Args)]
struct Given {
    /// The data directory of a server that ran alone and whose accounts are to live on: its OPAQUE
    /// setup and delivery key are taken, and its certificate.
    #[arg(long, value_name = "DATA_DIR")]
    from: Option<PathBuf>,
    /// The cluster's domain, what follows the `@` in its users' addresses.
    #[arg(long, value_name = "D", env = "QPQ_DOMAIN", default_value = "localhost", value_parser = domain)]
    domain: String,
    /// Further names and IP addresses in the certificate that is made, besides the domain and
    /// `localhost`.
    #[arg(long = "name", value_name = "N", env = "QPQ_TLS__NAMES", value_delimiter = ',', num_args = 1..)]
    names: Vec<String>,
    /// A certificate chain to take instead of making one, in DER or PEM.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, in DER or PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl Given {
    /// What a certificate that is made is good for; as `qpq-server` does it.
    fn certificate_names(&self) -> Vec<String> {
        let mut names = vec![self.domain.clone()];
        let others = ["localhost", "127.0.0.1", "::1"].map(String::from);
        for name in
            others.into_iter().chain(self.names.iter().filter(|name| !name.is_empty()).cloned())
        {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(out) = &args.out {
        return in_directory(out, args);
    }
    let contents = Contents::gather(&args.given)?;
    let name = args.kubernetes_secret.as_ref().expect("clap wants one of both");
    say(kubernetes::manifest(name, args.namespace.as_ref(), &contents))
}

fn in_directory(out: &std::path::Path, args: &Args) -> anyhow::Result<()> {
    if args.if_missing && directory::is_finished(out) {
        let made = directory::verify(out)?;
        return say(format_args!("{} is there already\n{made}", out.display()));
    }
    directory::prepare(out)?;
    let made = directory::write(out, &Contents::gather(&args.given)?)?;
    say(format_args!(
        "made {dir}, which all edges of the cluster share\n{made}\n\
         Keep a copy of {dir} where it is safe: without it nobody can log in again.\n\
         Give it whole to every edge, readable by its user alone, and name it in QPQ_CLUSTER__SECRETS_DIR.\n\
         Run `qpq-admin rotate-ticket-keys --dir {dir}` every 6 hours.\n",
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
