//! Tests of the server from its clients' side: every call goes through `Rpc::call` to a real
//! embedded store, with a clock that the test advances.

mod account;
mod auth;
mod blobs;
mod delivery;
mod devices;
mod endpoints;
mod greed;
mod groups;
mod harness;
mod health;
mod keys;
mod limits;
mod moderation;
mod observe;
mod password;
mod recovery;
mod registration;
mod rpc;
mod sessions;
mod subscribe;
mod user;
mod users;
mod waiters;
