//! Tests of the cluster store on real servers: the rules of every backend, and the rules between
//! edges.

mod backend;
mod blobs;
mod clocks;
mod conformance;
mod deletion;
mod devices;
mod edges;
mod endpoints;
mod failover;
mod groups;
mod history;
mod invites;
mod metrics;
mod moderation;
mod payloads;
mod people;
mod plans;
mod sessions;
mod skeletons;
mod start;
mod sweeping;
