//! The store of a single node: durable data in one SQLite file, everything else in this process.
//!
//! [`EmbeddedStore::open`] locks a data directory and returns the store, which implements the ports
//! of `qpq_ports`:
//! - One writer commits many calls in one transaction (`writer`). Reads run concurrently and see
//!   the last commit (WAL).
//! - An inbox is a range of one table. Triggers update its head, so neither an enqueue nor a read
//!   counts or scans (`migrations/0001_init.sql`, `messages`).
//! - Leases, wakes, rate limits and the session cache are in memory (`memory`), because no other
//!   process uses the store.
//! - A parameter of LIMIT is written `+?`. For a bare `?` there, SQLite plans with the value, and
//!   compiles the statement again for each value.
//!
//! Modules import from rows above their own, or from their row without a circle:
//!
//! | modules | content |
//! |---|---|
//! | `metrics`, `error`, `row`, `reader`, `clock`, `effects`, `statement` | the types that other modules share |
//! | `messages` | the SQL of the message tables |
//! | `memory` | the state in memory, and the one place that applies the effects of a commit |
//! | `files`, `directory`, `open_error`, `schema`, `tables` | the files and the schema |
//! | `damage`, `history` | damage to the file, and its replacement by an older copy |
//! | `writer` | the queue and the transactions |
//! | `store` | [`EmbeddedStore`] |
//! | `accounts`, `deletion`, `sessions`, `devices`, `inboxes`, `absence`, `groups`, `bans`, `blocks`, `reports`, `audit`, `keys`, `blobs`, `jobs`, `limiter`, `maintenance` | the ports, with their statements |
//! | `open`, `accept_clock`, `backup`, `export` | the entry points |

mod absence;
mod accept_clock;
mod accounts;
mod audit;
mod backup;
mod bans;
mod blobs;
mod blocks;
mod clock;
mod damage;
mod deletion;
mod devices;
mod directory;
mod effects;
mod endpoints;
mod error;
mod export;
mod files;
mod groups;
mod history;
mod inboxes;
mod invites;
mod jobs;
mod keys;
mod limiter;
mod maintenance;
mod memory;
mod messages;
mod metrics;
mod open;
mod open_error;
mod reader;
mod recovery;
mod reports;
mod row;
mod schema;
mod sessions;
mod statement;
mod store;
mod tables;
mod writer;

pub use accept_clock::{Accepted, accept_clock};
pub use backup::{BackupError, BlobFile, Claim, Inspection, blob_files, copy_database, inspect};
pub use clock::JUMP;
pub use export::{Export, ExportError};
pub use files::{BLOBS_DIRECTORY, DATABASE_FILE, LOCK_FILE, RESTORING_FILE, TRANSFERRED_FILE};
pub use invites::InvitesOperator;
pub use jobs::JobsOperator;
pub use open_error::OpenError;
pub use store::EmbeddedStore;
