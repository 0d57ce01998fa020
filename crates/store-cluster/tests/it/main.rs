//! The cluster store from outside, on real servers: the rules of every backend, and what edges owe
//! each other.

mod backend;
mod clocks;
mod conformance;
mod edges;
mod failover;
mod history;
mod metrics;
mod people;
mod sessions;
mod skeletons;
mod start;
mod sweeping;
