//! Scenarios over the whole: the binaries as users run them, seen from outside.

mod kill;
mod server;
mod wire;
