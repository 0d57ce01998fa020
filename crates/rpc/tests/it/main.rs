//! The server as its clients meet it: every call goes through `Rpc::call` to the real embedded
//! store, under a clock that is set by hand.

mod auth;
mod delivery;
mod greed;
mod harness;
mod health;
mod keys;
mod limits;
mod observe;
mod rpc;
mod sessions;
mod subscribe;
mod user;
mod users;
mod waiters;
