//! Scenarios over the whole: the binaries as users run them, seen from outside.

mod cluster;
mod kill;
mod server;
mod wire;
