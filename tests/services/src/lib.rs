//! What tests over the cluster stand on: real servers, faults between them, and a judge of what happened.
//!
//! [`Postgres`], [`Redis`] (alone, as [`RedisCluster`], or under [`RedisSentinel`]) and [`Nats`] are the real programs, each
//! in a temporary directory of its own on a port of 127.0.0.1 that nobody else uses. A test starts what it needs, may kill
//! it and start it again on the same port and data, and leaves nothing behind when it ends or dies.

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

pub use cluster::RedisCluster;
pub use nats::Nats;
pub use postgres::Postgres;
pub use redis::{Redis, Snapshot};
pub use sentinel::RedisSentinel;
