//! The cluster store from outside, on real servers: the rules of every backend, and what edges owe
//! each other.

mod backend;
mod clocks;
mod conformance;
mod devices;
mod edges;
mod failover;
mod groups;
mod history;
mod metrics;
mod payloads;
mod people;
mod sessions;
mod skeletons;
mod start;
mod sweeping;
