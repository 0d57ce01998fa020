//! Tests of the binary `qpq-admin`: its arguments, its output and the files that it writes.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod backup;
mod clock;
mod harness;
mod init;
mod invite;
mod jobs;
mod migrate;
mod rotate;
mod transfer;
