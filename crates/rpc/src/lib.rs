//! The server between the wire and the stores: authentication, limits, one handler per method, and
//! all answers.
//!
//! This crate depends on neither QUIC nor a database. `services/edge` passes connections and
//! requests to [`Rpc`], and the stores through `qpq_ports`. The method table of `qpq_proto`
//! determines the [`Handler`] of each id. A call takes these steps:
//!
//! find the row → authenticate → take budgets → decode → authorize → handle → [`Answer`]
//!
//! To add an RPC, add its messages and its row in `proto`, and write `impl Handler` in a file of
//! its area under `handlers/`. There is no registration.

pub mod account_events;
pub mod at_rest;
pub mod auth;
pub mod docs;
pub mod error;
pub mod limits;
pub mod opaque;

mod answers;
mod app;
mod compute;
mod connection;
mod dispatch;
mod handlers;
mod observe;
mod rpc;
mod signer;
mod tokens;
mod waiters;

pub use answers::AnswerMemory;
pub use app::{App, Config, IdentityProof, Parts, RegistrationMode};
pub use at_rest::AtRestKeys;
pub use auth::{Admin, Caller, FreshCaller, ModeratingCaller, SessionLifetimes};
pub use connection::{ClientConnection, Events};
pub use dispatch::{Cx, Handled, Handler, Response};
pub use error::{Code, Error};
pub use limits::{RateLimits, Subject};
pub use opaque::OpaqueServer;
pub use rpc::{Answer, Rpc};
pub use signer::DeliverySigner;
