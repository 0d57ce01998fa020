//! The store of a cluster: any number of edges over one Postgres, one Redis and one NATS.
//!
//! **Postgres commits, Redis serves, NATS wakes.** Everything that is acknowledged is committed in
//! Postgres first. Redis has copies, which are compared with Postgres before a read returns them,
//! and state that may be lost at any time: leases, waiters, rate limits. NATS carries best-effort
//! messages between edges.
//!
//! - `store`: the store of one edge, which implements every port; `effects`: the changes outside
//!   Postgres after a commit.
//! - `postgres`: operations and the schema; `redis`: one connection, the scripts of the queues;
//!   `nats`: the bus between edges.
//! - `tables`: the description of every table, from which `import` and `deletion` generate their
//!   statements.
//! - `inboxes`, `wakes`: the path of a message. `accounts` with `deletion`, `sessions`, `devices`,
//!   `groups`, `bans`, `blocks`, `reports`, `audit`, `keys`, `limiter`, `account_events`,
//!   `maintenance`, `jobs`, `blobs`: one port each.
//! - `history`: detects a Postgres that has returned to an earlier state; `time`: the clocks of the
//!   edge and of Postgres; `operate`: the connection for backups and restores.

mod account_events;
mod accounts;
mod audit;
mod bans;
mod blobs;
mod blocks;
mod config;
mod deletion;
mod devices;
mod effects;
mod endpoints;
mod error;
mod groups;
mod history;
mod import;
mod inboxes;
mod invites;
mod jobs;
mod keys;
mod limiter;
mod maintenance;
#[cfg(feature = "measure")]
pub mod measure;
mod metrics;
mod nats;
mod operate;
mod postgres;
mod recovery;
mod redis;
mod reports;
mod sessions;
mod skeletons;
mod store;
mod tables;
mod time;
mod wakes;

pub use config::{BlobPlaces, Config, Endpoint, Migrate, Timing};
pub use error::ConnectError;
pub use history::begin_history;
pub use import::{Import, ImportError};
pub use inboxes::COMMITTERS;
pub use invites::operator_invites;
pub use jobs::operator_jobs;
pub use operate::{BEGIN_HISTORY, DatabaseSnapshot, Operator, client_environment};
pub use postgres::migrate;
pub use qpq_blob_store::BucketConfig;
pub use store::ClusterStore;
pub use time::Clocks;
