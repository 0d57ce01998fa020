//! One handler a method, one file an area. The table in `dispatch.rs` finds them by their types.

mod auth;
mod delivery;
mod health;
mod keys;
mod subscribe;
mod users;
