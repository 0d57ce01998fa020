//! One handler per method, in the file or directory of its area. `dispatch` finds a handler by the
//! type of its method, so there is no registration here.

mod account;
mod auth;
mod blob;
mod delivery;
mod device;
mod endpoint;
mod event;
mod group;
mod health;
mod keys;
mod moderation;
mod recovery;
mod user;
