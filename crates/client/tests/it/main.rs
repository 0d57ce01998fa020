//! The SDK against the real server, which every test starts for itself in its own process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod auth;
mod backlog;
mod chat;
mod connection;
mod crash;
mod harness;
mod hostile;
mod import;
mod interleavings;
mod liar;
mod network;
mod packages;
mod profile;
mod requests;
mod restore;
mod unwanted;
