//! The server as its clients meet it: every call goes through `Rpc::call` to the real embedded store, under a clock that is
//! set by hand.

mod auth;
mod harness;
mod health;
mod limits;
mod observe;
mod rpc;
mod sessions;
mod users;
