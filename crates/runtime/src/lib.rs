//! The parts that every server binary needs: configuration, logs, metrics, health over HTTP,
//! signals and secrets on disk. Nothing here depends on the service that runs.
//!
//! A binary uses the modules in this order: [`config`] reads the settings, [`log`], [`trace`] and
//! [`metrics`] make the process observable, [`data_dir`] stores its secrets, [`lifecycle`] runs and
//! ends its tasks, [`http`] answers probes, and [`service_manager`] receives the state of the
//! process.

pub mod config;
pub mod data_dir;
pub mod http;
pub mod lifecycle;
pub mod log;
pub mod metrics;
pub mod service_manager;
pub mod trace;
