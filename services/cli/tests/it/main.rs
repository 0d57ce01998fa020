//! The real `qpq`, as a process of its own, against a real server.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod account;
mod block;
mod chat;
mod concurrent;
mod device;
mod docs;
mod group;
mod harness;
mod message;
mod moderate;
mod password;
mod pins;
mod recovery;
mod reports;
mod restore;
mod terminal;
mod trouble;
