//! `qpq-server`: QUIC on the outside, the stores on the inside, the dispatcher between them.
//!
//! The binary is [`args`] → [`Config`] → [`compose()`] → wait for a signal → [`Running::shutdown`].
//! Tests boot [`compose()`] in their own process: what they test is what runs.

pub mod args;
pub mod banner;
mod budgets;
mod certificate;
mod check;
mod cluster;
mod compose;
mod config;
mod listen;
mod maintenance;
mod probe;
mod secrets;
mod service;
mod store;

pub use check::{Report, check};
pub use cluster::PasswordFileError;
pub use compose::{Running, StartError, compose};
pub use config::{Config, FOREIGN_VARIABLES, UsernameScripts};
pub use listen::Listen;
