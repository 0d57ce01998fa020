//! What every server binary needs around its own work: configuration, logs, metrics, health over
//! HTTP, signals, secrets on disk. Nothing here knows what is served.
//!
//! The order in a binary's life is the order of the modules: [`config`] reads the settings,
//! [`log`], [`trace`] and [`metrics`] make the process observable, [`data_dir`] holds its secrets,
//! [`lifecycle`] runs its tasks and tells them when to end, [`http`] answers probes. [`backoff`] is
//! the one way to wait before trying again, [`Redacted`] the one way to carry a secret through
//! things that print.

pub mod backoff;
pub mod config;
pub mod data_dir;
pub mod http;
pub mod lifecycle;
pub mod log;
pub mod metrics;
mod redacted;
pub mod trace;

pub use redacted::Redacted;
