//! What tests over the cluster stand on: real servers, faults between them, and a judge of what
//! happened.
//!
//! [`Postgres`], [`Redis`] (alone, as [`RedisCluster`], or under [`RedisSentinel`]) and [`Nats`]
//! are the real programs, each in a temporary directory of its own on a port of 127.0.0.1 that
//! nobody else uses. A test starts what it needs, may kill it and start it again on the same port
//! and data, and leaves nothing behind when it ends or dies. With an [`Authority`] they speak TLS.
//!
//! [`proxy`] stands between a program and such a server, or between two programs, and does to their
//! packets what networks do. [`history`] records what every call was answered, and says at the end
//! whether an inbox may have answered so.

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
mod sentinel;
mod standby;

pub use authority::Authority;
pub use cluster::RedisCluster;
pub use nats::Nats;
pub use postgres::Postgres;
pub use redis::{Redis, Snapshot};
pub use sentinel::RedisSentinel;
pub use standby::{Backup, Restore, Standby};
