//! The client library against the real server. Each test starts a server of its own, in its own
//! process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod auth;
mod backlog;
mod chat;
mod connection;
mod crash;
mod files;
mod groups;
mod harness;
mod hostile;
mod import;
mod interleavings;
mod liar;
mod link;
mod network;
mod packages;
mod password;
mod profile;
mod recovery;
mod requests;
mod restore;
mod unwanted;
mod vectors;
