//! Runs durable work after the answer: claims jobs from the port [`Jobs`](qpq_ports::Jobs), runs
//! the [`Work`] of their kind, and records how each run ended.
//!
//! Every edge of a cluster runs the same [`Runner`]. Only one edge at a time has the claim on a
//! job. The jobs of a killed edge run on another edge after their lease, so work must be safe to
//! repeat.
//!
//! | file | content |
//! |---|---|
//! | `work` | the interface of a kind of work, and its [`Policy`] |
//! | `runner` | one task per kind: claim, run, renew, finish, drain |
//! | `metric` | names and descriptions of the metrics |

mod metric;
mod runner;
#[cfg(test)]
mod tests;
mod work;

pub use metric::describe;
pub use runner::{Runner, Wake};
pub use work::{Completion, Failure, Policy, Work};
