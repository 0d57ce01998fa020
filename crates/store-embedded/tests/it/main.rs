//! Tests of the embedded store through its public interface: the conformance suite, random
//! histories compared with a model, processes that are killed, disks that fill up, and directories
//! that cannot be used.

mod backend;
mod blobs;
mod child;
mod conformance;
mod deletion;
mod devices;
mod disk;
mod groups;
mod histories;
mod kill;
mod model;
mod open;
mod ops;
mod payloads;
