//! The real `qpq`, as a process of its own, against a real server.

mod account;
mod chat;
mod group;
mod harness;
mod message;
mod terminal;
mod trouble;
