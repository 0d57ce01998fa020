//! The base of cluster tests: real servers, network faults between them, and a checker of the
//! recorded history.
//!
//! [`Postgres`], [`Redis`] (also as [`RedisCluster`] or with a [`RedisSentinel`]), [`Nats`] and
//! [`SeaweedFs`] run the real programs, each in its own temporary directory on reserved ports of
//! 127.0.0.1. A test starts the servers that it needs, and may kill them and start them again on
//! the same ports and data. The servers end with the test, also if it is killed. With an
//! [`Authority`] they use TLS.
//!
//! A [`proxy`] between two programs delays, drops or resets their packets as networks do.
//! [`history`] records every call with its answer, and checks at the end whether a correct inbox
//! can give these answers.

mod authority;
mod cluster;
pub mod history;
mod nats;
mod port;
mod postgres;
mod process;
mod program;
pub mod proxy;
mod redis;
pub mod resp;
mod seaweed;
mod sentinel;
mod standby;

pub use authority::Authority;
pub use cluster::RedisCluster;
pub use nats::Nats;
pub use postgres::Postgres;
pub use redis::{Redis, Snapshot};
pub use seaweed::SeaweedFs;
pub use sentinel::RedisSentinel;
pub use standby::{Backup, Replacement, Restore, Standby};
