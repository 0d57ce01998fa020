//! `qpq-admin migrate`: brings the schema in the cluster's Postgres up to date, before edges of a
//! new version start. Those of the old version go on running: a release only adds what its
//! predecessor can live with.

use crate::{
    block_on, say,
    settings::{self, patiently},
};

/// Which cluster's.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: settings::Location,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let given = args.settings.load()?;
    // Whose cluster it is matters to nobody who only sees to the schema.
    let database = given.database([0; 32])?;
    let version = block_on(async {
        let migrate = async || qpq_store_cluster::migrate(&database).await;
        Ok(patiently(database.start_timeout, migrate).await?)
    })?;
    say(format_args!("the database's schema is at version {version}\n"))
}
