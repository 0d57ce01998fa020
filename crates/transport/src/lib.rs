//! QUIC for qpq: the only crate that depends on quinn and rustls.
//!
//! On the server's side a [`Server`] accepts connections and turns each client-opened stream into
//! one call of a [`Service`], which implements the calls. A request is checked by its header before
//! its payload is buffered, a reply can be observed until it is delivered ([`DeliveryObserver`]),
//! and a half-written reply that is dropped is reset, never ended cleanly. On the client's side a
//! [`client::Dialer`] creates connections and a [`client::Connection`] makes calls.
//!
//! See [`Service`] for the contract, [`Config`] for the limits and their defaults, [`metric`] for
//! the metrics, [`Certificates`] for the server's identity, [`ClusterKeys`] for the keys that the
//! edges of a cluster share.

mod admission;
mod authorities;
mod certificates;
pub mod client;
mod client_certificate;
mod cluster;
mod config;
mod connection;
mod context;
mod events;
mod fingerprint;
mod identity;
pub mod metric;
mod request_memory;
mod server;
mod service;
mod socket;
mod stream;
mod tls;
mod x509;

pub use certificates::{Certificates, RELOAD_INTERVAL, Reload};
pub use client_certificate::{ClientAuth, ClientCertificate};
pub use cluster::{
    ClusterEdge, ClusterKeyFiles, ClusterKeys, ClusterKeysError, KeyReload, RESET_KEY_LEN,
    ring::KeyRing,
};
pub use config::{Config, DRAIN_DEADLINE, Timeouts, TransportLimits};
pub use events::{EventError, EventSink};
pub use fingerprint::{Fingerprint, ParseFingerprintError};
pub use identity::{Identity, IdentityError, SelfSigned};
pub use server::{BindError, Server};
pub use service::{Alpn, DeliveryObserver, Peer, Reply, Service};
