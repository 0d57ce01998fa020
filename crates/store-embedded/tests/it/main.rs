//! The embedded store from outside: the rules of every backend, random histories against a model,
//! processes that are killed, disks that fill up, and directories that cannot be used.

mod backend;
mod child;
mod conformance;
mod disk;
mod kill;
mod model;
mod open;
mod ops;
