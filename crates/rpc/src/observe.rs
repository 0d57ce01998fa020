//! Observes each call: one access-log line and two metrics, without tokens, keys, names or
//! addresses.
//!
//! | name | kind | unit | meaning |
//! |---|---|---|---|
//! | `qpq_rpc_calls_total{method,code}` | counter | calls | ended calls; `code` is `ok`, a code of `docs/errors.md`, or `cancelled` |
//! | `qpq_rpc_answer_bytes` | gauge | bytes | memory reserved for answers that clients have not received yet |
//! | `qpq_rpc_seconds{method}` | histogram | seconds | time from the complete request to its answer |
//!
//! The access log is the target `qpq::access`, with `method`, `code`, `us`, `bytes_in` and
//! `bytes_out`. Ok and cancelled calls are logged at debug. Of the refusals with one code, a few in
//! ten seconds are logged at info and the others at debug. The field `suppressed` counts the latter
//! since the last line at info. A second event of each refusal has the cause, with the level of the
//! code if the first is at info, and at debug otherwise.
//!
//! Each metric handle is resolved once, so a call formats and allocates nothing here unless its
//! line is logged.

use std::{fmt, mem, sync::OnceLock, time::Duration};

use metrics::{Counter, Histogram, Unit};
use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::Level;

use crate::{Answer, Code, Error, dispatch::Entry};

const CALLS: &str = "qpq_rpc_calls_total";
const SECONDS: &str = "qpq_rpc_seconds";

/// The method label of calls to methods that are not served. The id is not a label, because a
/// client could create any number of them.
const UNKNOWN: &str = "unknown";

/// Counts and logs calls.
pub(crate) struct Observer {
    /// The metrics of each row of the table. The last entry is for methods that are not served.
    methods: Vec<MethodMetrics>,
    samples: Samples,
}

/// Selects the refusals that are logged at info: a few of each code.
struct Samples(Vec<Mutex<Sample>>);

#[derive(Default)]
struct Sample {
    since: Option<Instant>,
    logged: u32,
    /// The number of suppressed refusals since the last logged one.
    suppressed: u64,
}

/// The time in which at most [`MAX_LINES`] refusals of one code are logged at info.
const SAMPLE_TIME: Duration = Duration::from_secs(10);
const MAX_LINES: u32 = 5;

impl Samples {
    fn new() -> Self {
        Self(Code::ALL.iter().map(|_| Mutex::default()).collect())
    }

    /// Returns the number of lines of `code` that were suppressed since the last one, if a line is
    /// logged now. `None` if this line is suppressed too.
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
    /// The counters by outcome, see [`CallOutcome::index`].
    calls: Vec<OnceLock<Counter>>,
}

/// The outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallOutcome {
    Ok,
    Failed(Code),
    /// The client reset the stream or closed the connection before the answer.
    Cancelled,
}

impl CallOutcome {
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
        metrics::describe_counter!(CALLS, "Ended calls, by method and code.");
        metrics::describe_histogram!(
            SECONDS,
            Unit::Seconds,
            "Time from the complete request to its answer."
        );
        let named = table.iter().map(|entry| entry.info.name).chain([UNKNOWN]);
        Self { methods: named.map(MethodMetrics::new).collect(), samples: Samples::new() }
    }

    /// Begins to observe a call of the method at `row`. A call whose observation is dropped before
    /// its end counts as cancelled.
    pub(crate) fn begin(&self, row: Option<usize>, bytes_in: usize) -> Observation<'_> {
        let last = self.methods.len() - 1;
        let method = &self.methods[row.unwrap_or(last)];
        let samples = &self.samples;
        Observation { method, samples, started: Instant::now(), bytes_in, ended: false }
    }
}

/// A call in progress.
pub(crate) struct Observation<'a> {
    method: &'a MethodMetrics,
    samples: &'a Samples,
    started: Instant,
    bytes_in: usize,
    ended: bool,
}

impl Observation<'_> {
    /// Ends a call that is answered Ok.
    pub(crate) fn succeed(mut self, bytes_out: usize) {
        self.end(CallOutcome::Ok, bytes_out, None);
    }

    /// Ends a call that is refused, and returns the answer.
    pub(crate) fn refuse(mut self, error: &Error) -> Answer {
        let answer = error.answer();
        let sampled = self.samples.take(error.code(), Instant::now());
        self.end(CallOutcome::Failed(error.code()), answer.payload.len(), sampled);
        log_cause(self.method.name, error, sampled);
        answer
    }

    /// Records the end. `sampled` is a result of [`Samples::take`].
    fn end(&mut self, outcome: CallOutcome, bytes_out: usize, sampled: Option<u64>) {
        self.ended = true;
        let elapsed = self.started.elapsed();
        self.method.count(outcome);
        self.method.seconds().record(elapsed.as_secs_f64());
        let (method, code) = (self.method.name, outcome.as_str());
        // Not the `u128` itself, which the JSON format writes as text.
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
            self.end(CallOutcome::Cancelled, 0, None);
        }
    }
}

impl MethodMetrics {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            seconds: OnceLock::new(),
            calls: (0..CallOutcome::COUNT).map(|_| OnceLock::new()).collect(),
        }
    }

    fn count(&self, outcome: CallOutcome) {
        let resolve =
            || metrics::counter!(CALLS, "method" => self.name, "code" => outcome.as_str());
        self.calls[outcome.index()].get_or_init(resolve).increment(1);
    }

    fn seconds(&self) -> &Histogram {
        self.seconds.get_or_init(|| metrics::histogram!(SECONDS, "method" => self.name))
    }
}

/// Logs the cause of a refusal, at the level of its row if it is sampled, else at debug.
fn log_cause(method: &'static str, error: &Error, sampled: Option<u64>) {
    let code = error.code().as_str();
    let cause = std::error::Error::source(error);
    let level = if sampled.is_some() { error.code().level() } else { Level::DEBUG };
    match level {
        Level::ERROR => tracing::error!(target: "qpq::rpc", method, code, cause, "call failed"),
        Level::WARN => {
            tracing::warn!(target: "qpq::rpc", method, code, cause, "call not served")
        }
        _ => tracing::debug!(target: "qpq::rpc", method, code, cause, "call refused"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_first_few_of_a_code_are_counted_instead_of_logged() {
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
