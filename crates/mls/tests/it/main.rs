//! Clients talking to each other in memory, through nothing but the bytes that they would send.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod changes;
mod conversations;
mod crashes;
mod devices;
mod hostile;
mod import;
mod joining;
mod order;
mod world;
