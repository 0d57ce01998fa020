//! Tests of the transport from outside: real sockets on the loopback, a small service, and clients
//! that violate the protocol.
//!
//! [`support`] contains the service, its harness and a client that writes raw bytes. Each of the
//! other modules tests one part of the contract. No test sleeps: tests wait for reports of the
//! service. Tests of a timeout configure it short.

#![allow(clippy::unwrap_used, reason = "the exception for tests does not reach their helpers")]

mod admission;
mod calls;
mod certificates;
mod client;
mod cluster;
mod delivery;
mod drain;
mod frames;
mod metrics;
mod mutual_tls;
mod relay;
mod requests;
mod support;
