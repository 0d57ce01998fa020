//! The SDK against the real server, which every test starts for itself in its own process.

mod auth;
mod chat;
mod connection;
mod crash;
mod harness;
mod hostile;
mod profile;
