//! Tests of the server from outside: the binary with its arguments, files, signals and ports, and
//! `compose` for tests with two servers in one process.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod cluster_traces;
mod collector;
mod composed;
mod configuration;
mod harness;
mod metrics;
mod refusals;
mod running;
mod service_manager;
mod stopping;
mod traces;
