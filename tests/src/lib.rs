//! What the tests over the whole and the load generator share: a client of its own, accounts, and
//! servers as processes.
//!
//! The client is a second implementation of the wire, on bare quinn: it shares only the messages
//! with the SDK, so what both agree on is the protocol.

pub mod accounts;
pub mod balancer;
pub mod client;
pub mod cluster;
pub mod havoc;
pub mod process;
pub mod roaming;
pub mod traffic;
