//! `qpq-admin` from the outside: the binary with its arguments, what it prints and what it leaves
//! on disk.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod backup;
mod clock;
mod harness;
mod init;
mod jobs;
mod migrate;
mod rotate;
mod transfer;
