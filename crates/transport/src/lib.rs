//! QUIC for qpq: the only crate that knows quinn and rustls.
//!
//! On the server's side a [`Server`] accepts connections and turns each client-opened stream into
//! one call of a [`Service`]; what the calls mean is the service's business. A request is judged by
//! its header before its payload is buffered, a reply knows whether it arrived ([`Delivery`]), and
//! a dropped half-written answer is a reset, never a clean end. On the client's side
//! [`client::Dialer`] makes connections and [`client::Connection`] makes calls.
//!
//! Where to read on: [`Service`] for the contract, [`Config`] for the limits and their defaults,
//! [`metric`] for what is measured, [`Certificates`] for the server's identity, [`FleetKeys`] for
//! what servers share that stand in for each other.

mod certificates;
pub mod client;
mod config;
mod connection;
mod der;
mod drain;
mod events;
mod fingerprint;
mod fleet;
mod gate;
mod identity;
pub mod metric;
mod server;
mod service;
mod socket;
mod stream;
mod tls;

pub use certificates::{Certificates, RELOAD_INTERVAL, Reload};
pub use config::{Config, DRAIN_DEADLINE, Limits, Timeouts};
pub use events::{EventError, EventSink};
pub use fingerprint::{Fingerprint, ParseFingerprintError};
pub use fleet::{FleetFiles, FleetKeys, FleetKeysError, KeyReload, KeyRing, Member, RESET_KEY_LEN};
pub use identity::{Identity, IdentityError, SelfSigned};
pub use server::{BindError, Server};
pub use service::{Alpn, Delivery, Peer, Refusal, Reply, Service};
