//! One handler a method, one file an area. The table in `dispatch.rs` finds them by their types.

mod auth;
mod health;
mod users;
