//! `qpq-server`: the transport, the dispatcher and a store, composed into a server.
//!
//! The binary reads [`args`] and [`Config`], calls [`compose()`], waits for a signal and calls
//! [`Running::shutdown`]. Tests call [`compose()`] in their own process.

pub mod args;
mod at_rest;
pub mod banner;
mod blobs;
mod budgets;
mod certificate;
mod check;
mod cluster;
mod compose;
mod config;
mod erasure;
mod jobs;
mod listen;
mod maintenance;
mod probe;
mod rotation;
mod secrets;
mod service;
mod store;

pub use certificate::certificate_names;
pub use check::{Report, check};
pub use cluster::PasswordFileError;
pub use compose::{Running, StartError, compose, compose_with};
pub use config::{Config, FOREIGN_VARIABLES};
pub use listen::Listen;
pub use qpq_domain::UsernameScripts;
pub use qpq_rpc::RegistrationMode;
pub use rotation::{AtRestKeysAdded, RotateError, add_at_rest_keys, rotate, rotate_at_rest_keys};
