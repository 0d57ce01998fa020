//! The parts that the scenario tests and the load generator share: a client, accounts, and servers
//! as processes.
//!
//! The client is a second implementation of the protocol, on bare quinn. The two implementations
//! share only the messages, so a deviation of either from the protocol shows as a difference.

pub mod accounts;
pub mod balancer;
pub mod client;
pub mod cluster;
pub mod faults;
pub mod metrics;
pub mod process;
pub mod roaming;
pub mod store_change;
pub mod traffic;
