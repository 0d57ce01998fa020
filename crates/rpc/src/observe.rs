//! What operators see of each call: one access-log line and two metrics, none with a token, key,
//! name or address in it.
//!
//! | name | kind | unit | what |
//! |---|---|---|---|
//! | `qpq_rpc_calls_total{method,code}` | counter | calls | calls answered; `code` is `ok`, a code of `docs/errors.md`, or `cancelled` |
//! | `qpq_rpc_answer_bytes` | gauge | bytes | memory reserved for answers that wait for their clients |
//! | `qpq_rpc_seconds{method}` | histogram | seconds | time from the whole request to its answer |
//!
//! The access log is the target `qpq::access`, with `method`, `code`, `us`, `bytes_in` and
//! `bytes_out`. Calls that are answered Ok or cancelled are at debug. Refusals are at info, a few
//! of each code in ten seconds; `suppressed` counts those that are at debug instead. Failures of
//! the server get a second event, at their level, with the cause, and at a bounded rate too.
//!
//! Metric handles are resolved once each, so a call formats and allocates nothing here unless its
//! line is wanted.

use std::{fmt, mem, sync::OnceLock, time::Duration};

use metrics::{Counter, Histogram, Unit};
use parking_lot::Mutex;
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
    samples: Samples,
}

/// Which refusals are logged: a few of each code in a time.
struct Samples(Vec<Mutex<Sample>>);

#[derive(Default)]
struct Sample {
    since: Option<Instant>,
    logged: u32,
    /// Since the last that was logged.
    suppressed: u64,
}

/// The time in which at most [`MAX_LINES`] refusals, and as many failures, of one code are logged.
const SAMPLE_TIME: Duration = Duration::from_secs(10);
const MAX_LINES: u32 = 5;

impl Samples {
    fn new() -> Self {
        Self(Code::ALL.iter().map(|_| Mutex::default()).collect())
    }

    /// Whether the next line of `code` is logged, and how many were not since the last that was.
    fn take(&self, code: Code, now: Instant) -> Option<u64> {
        let mut sample = self.0[code as usize].lock();
        if sample.since.is_none_or(|since| now - since >= SAMPLE_TIME) {
            (sample.since, sample.logged) = (Some(now), 0);
        }
        if sample.logged >= MAX_LINES {
            sample.suppressed += 1;
            return None;
        }
        sample.logged += 1;
        Some(mem::take(&mut sample.suppressed))
    }
}

struct MethodMetrics {
    name: &'static str,
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
        Self { methods: named.map(MethodMetrics::new).collect(), samples: Samples::new() }
    }

    /// A call of the method at `row` with so many bytes. Dropped without an end, it counts as
    /// cancelled.
    pub(crate) fn begin(&self, row: Option<usize>, bytes_in: usize) -> Observation<'_> {
        let last = self.methods.len() - 1;
        let method = &self.methods[row.unwrap_or(last)];
        let samples = &self.samples;
        Observation { method, samples, started: Instant::now(), bytes_in, ended: false }
    }
}

/// One call being observed.
pub(crate) struct Observation<'a> {
    method: &'a MethodMetrics,
    samples: &'a Samples,
    started: Instant,
    bytes_in: usize,
    ended: bool,
}

impl Observation<'_> {
    /// The call was answered Ok.
    pub(crate) fn succeed(mut self, bytes_out: usize) {
        self.end(Outcome::Ok, bytes_out, None);
    }

    /// The call failed: what the client is told.
    pub(crate) fn refuse(mut self, error: &Error) -> Answer {
        let answer = error.answer();
        let sampled = self.samples.take(error.code(), Instant::now());
        self.end(Outcome::Failed(error.code()), answer.payload.len(), sampled);
        log_cause(self.method.name, error, sampled);
        answer
    }

    /// `sampled` as from [`Samples::take`].
    fn end(&mut self, outcome: Outcome, bytes_out: usize, sampled: Option<u64>) {
        self.ended = true;
        let elapsed = self.started.elapsed();
        self.method.count(outcome);
        self.method.seconds().record(elapsed.as_secs_f64());
        let (method, code) = (self.method.name, outcome.as_str());
        // A `u64`: the JSON format writes a `u128` as text.
        let us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let bytes_in = self.bytes_in;
        match sampled {
            Some(suppressed) => {
                tracing::info!(
                    target: "qpq::access",
                    method, code, us, bytes_in, bytes_out, suppressed
                );
            }
            None => {
                tracing::debug!(target: "qpq::access", method, code, us, bytes_in, bytes_out);
            }
        }
    }
}

impl Drop for Observation<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Outcome::Cancelled, 0, None);
        }
    }
}

impl MethodMetrics {
    fn new(name: &'static str) -> Self {
        Self {
            name,
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

/// A cause goes to the log, at the level of its row if it is sampled, and nowhere else.
fn log_cause(method: &'static str, error: &Error, sampled: Option<u64>) {
    let code = error.code().as_str();
    let cause = std::error::Error::source(error);
    let level = if sampled.is_some() { error.code().level() } else { Level::DEBUG };
    match level {
        Level::ERROR => tracing::error!(target: "qpq::rpc", method, code, cause, "a call failed"),
        Level::WARN => {
            tracing::warn!(target: "qpq::rpc", method, code, cause, "a call could not be served")
        }
        _ => tracing::debug!(target: "qpq::rpc", method, code, cause, "a call was refused"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_of_each_code_are_logged_and_the_others_counted() {
        let (samples, start) = (Samples::new(), Instant::now());
        for _ in 0..MAX_LINES {
            assert_eq!(samples.take(Code::RateLimited, start), Some(0));
        }
        for _ in 0..100 {
            assert_eq!(samples.take(Code::RateLimited, start + SAMPLE_TIME / 2), None);
        }
        assert_eq!(samples.take(Code::Internal, start), Some(0), "a code of its own");
        assert_eq!(samples.take(Code::RateLimited, start + SAMPLE_TIME), Some(100));
        assert_eq!(samples.take(Code::RateLimited, start + SAMPLE_TIME), Some(0));
    }
}
