//! `qpq-admin migrate`: brings the schema in the cluster's Postgres up to date, before edges of a
//! new release start.
//!
//! Edges of the previous release continue to run, because a release only adds to the schema.

use crate::{
    block_on, print,
    settings::{self, connect_with_retry},
};

/// The arguments of `migrate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: settings::Location,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let settings = args.settings.load()?;
    // A migration does not check the OPAQUE setup, which identifies a cluster.
    let database = settings.database([0; 32])?;
    let version = block_on(async {
        let migrate = async || qpq_store_cluster::migrate(&database).await;
        Ok(connect_with_retry(database.start_timeout, migrate).await?)
    })?;
    print(format_args!("the database's schema is at version {version}\n"))
}
