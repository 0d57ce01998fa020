//! What operators see of each call: one access-log line and two metrics, none with a token, key,
//! name or address in it.
//!
//! | name | kind | unit | what |
//! |---|---|---|---|
//! | `qpq_rpc_calls_total{method,code}` | counter | calls | calls answered; `code` is `ok`, a code of `docs/errors.md`, or `cancelled` |
//! | `qpq_rpc_seconds{method}` | histogram | seconds | time from the whole request to its answer |
//!
//! The access log is the target `qpq::access` at info (Health at debug), with `method`, `code`,
//! `us`, `bytes_in` and `bytes_out`. Errors of the server's own making get a second event, at their
//! level, with the cause.
//!
//! Metric handles are resolved once each, so a call formats and allocates nothing here unless its
//! line is wanted.

use std::{fmt, sync::OnceLock};

use metrics::{Counter, Histogram, Unit};
use qpq_proto::{Method as _, methods::Health};
use tokio::time::Instant;
use tracing::Level;

use crate::{Answer, Code, Error, dispatch::Entry};

const CALLS: &str = "qpq_rpc_calls_total";
const SECONDS: &str = "qpq_rpc_seconds";

/// The label of calls to methods that are not served: what the peer sent instead is its own.
const UNKNOWN: &str = "unknown";

/// Counts and logs calls.
pub(crate) struct Observer {
    /// By row; the last for what is not served.
    methods: Vec<MethodMetrics>,
}

struct MethodMetrics {
    name: &'static str,
    /// Asked so often that its lines are for debugging.
    is_health: bool,
    seconds: OnceLock<Histogram>,
    /// By outcome, see [`Outcome::index`].
    calls: Vec<OnceLock<Counter>>,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Ok,
    Failed(Code),
    /// The client went away before it was answered.
    Cancelled,
}

impl Outcome {
    const COUNT: usize = Code::ALL.len() + 2;

    const fn index(self) -> usize {
        match self {
            Self::Ok => 0,
            Self::Cancelled => 1,
            Self::Failed(code) => 2 + code as usize,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::Failed(code) => code.as_str(),
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

impl Observer {
    pub(crate) fn new(table: &[Entry]) -> Self {
        metrics::describe_counter!(CALLS, "Calls answered, by method and code.");
        metrics::describe_histogram!(
            SECONDS,
            Unit::Seconds,
            "Time from the whole request to its answer."
        );
        let named = table.iter().map(|entry| entry.info.name).chain([UNKNOWN]);
        Self { methods: named.map(MethodMetrics::new).collect() }
    }

    /// A call of the method at `row` with so many bytes. Dropped without an end, it counts as
    /// cancelled.
    pub(crate) fn begin(&self, row: Option<usize>, bytes_in: usize) -> Observation<'_> {
        let last = self.methods.len() - 1;
        let method = &self.methods[row.unwrap_or(last)];
        Observation { method, started: Instant::now(), bytes_in, ended: false }
    }
}

/// One call being observed.
pub(crate) struct Observation<'a> {
    method: &'a MethodMetrics,
    started: Instant,
    bytes_in: usize,
    ended: bool,
}

impl Observation<'_> {
    /// The call was answered Ok.
    pub(crate) fn succeed(mut self, bytes_out: usize) {
        self.end(Outcome::Ok, bytes_out);
    }

    /// The call failed: what the client is told.
    pub(crate) fn refuse(mut self, error: &Error) -> Answer {
        let answer = error.answer();
        self.end(Outcome::Failed(error.code()), answer.payload.len());
        log_cause(self.method.name, error);
        answer
    }

    fn end(&mut self, outcome: Outcome, bytes_out: usize) {
        self.ended = true;
        let elapsed = self.started.elapsed();
        self.method.count(outcome);
        self.method.seconds().record(elapsed.as_secs_f64());
        let (method, code) = (self.method.name, outcome.as_str());
        // A `u64`: the JSON format writes a `u128` as text.
        let us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let bytes_in = self.bytes_in;
        if self.method.is_health {
            tracing::debug!(target: "qpq::access", method, code, us, bytes_in, bytes_out);
        } else {
            tracing::info!(target: "qpq::access", method, code, us, bytes_in, bytes_out);
        }
    }
}

impl Drop for Observation<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Outcome::Cancelled, 0);
        }
    }
}

impl MethodMetrics {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            is_health: name == Health::INFO.name,
            seconds: OnceLock::new(),
            calls: (0..Outcome::COUNT).map(|_| OnceLock::new()).collect(),
        }
    }

    fn count(&self, outcome: Outcome) {
        let resolve =
            || metrics::counter!(CALLS, "method" => self.name, "code" => outcome.as_str());
        self.calls[outcome.index()].get_or_init(resolve).increment(1);
    }

    fn seconds(&self) -> &Histogram {
        self.seconds.get_or_init(|| metrics::histogram!(SECONDS, "method" => self.name))
    }
}

/// A cause goes to the log, at the level of its row, and nowhere else.
fn log_cause(method: &'static str, error: &Error) {
    let code = error.code().as_str();
    let cause = std::error::Error::source(error);
    match error.code().level() {
        Level::ERROR => tracing::error!(target: "qpq::rpc", method, code, cause, "a call failed"),
        Level::WARN => {
            tracing::warn!(target: "qpq::rpc", method, code, cause, "a call could not be served")
        }
        _ => tracing::debug!(target: "qpq::rpc", method, code, cause, "a call was refused"),
    }
}
