//! Direct endpoints of clients (800 and 801): an account publishes one, any session resolves it.

mod publish_endpoint;
mod resolve_endpoint;
