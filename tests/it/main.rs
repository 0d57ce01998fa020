//! Scenarios over the whole: the binaries as users run them, seen from outside.

mod cluster;
mod kill;
mod restore;
mod server;
mod wire;
