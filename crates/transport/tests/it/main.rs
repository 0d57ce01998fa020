//! The transport seen from outside: real sockets on the loopback, a small service, and clients that
//! break the rules.
//!
//! [`support`] has the service, its harness and a raw client that writes what it likes; the other
//! modules test one part of the contract each. Nothing sleeps: tests wait for what the service
//! reports. Timeouts of the server are configured short where a test is about them.

#![allow(clippy::unwrap_used, reason = "the exception for tests does not reach their helpers")]

mod admission;
mod calls;
mod certificates;
mod client;
mod delivery;
mod drain;
mod fleet;
mod frames;
mod metrics;
mod relay;
mod support;
