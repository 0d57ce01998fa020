//! Scenarios with the binaries as users run them.

mod advisories;
mod cluster;
mod greed;
mod interop;
mod kill;
mod restore;
mod server;
mod wire;
