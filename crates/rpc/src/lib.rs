//! The server between the wire and the stores: who may call what and how often, one handler a
//! method, and every answer.
//!
//! It knows neither QUIC nor a database. `services/edge` gives it connections and requests
//! ([`Rpc`]) and the stores behind `qpq_ports`; the method table of `qpq_proto` says which
//! [`Handler`] answers which id. A call goes
//!
//! row by id · session from field 15 · rate-limit class · deadline · log → handler → [`Answer`]
//!
//! which is `dispatch` from top to bottom. To add an RPC: its messages and its row in `proto`, then
//! `impl Handler` in the file of its area under `handlers/`; nothing is registered anywhere.

pub mod account_events;
pub mod auth;
pub mod docs;
pub mod error;
pub mod limits;
pub mod opaque;

mod answers;
mod app;
mod connection;
mod dispatch;
mod gate;
mod handlers;
mod observe;
mod rpc;
mod signer;
mod tokens;
mod waiters;

pub use answers::AnswerMemory;
pub use app::{App, Config, IdentityProof, Parts};
pub use auth::{Admin, Caller, FreshCaller, SessionLifetimes};
pub use connection::{Connection, Events};
pub use dispatch::{Answered, Cx, Handler};
pub use error::{Code, Error};
pub use limits::{RateLimits, Subject};
pub use opaque::OpaqueServer;
pub use qpq_wire::Refusal;
pub use rpc::{Answer, Rpc, Settlement};
pub use signer::DeliverySigner;
