//! The printed result of a run.

use std::{fmt, time::Duration};

use crate::open_loop::Tally;

/// The result of a run with the server's cost.
pub(crate) struct Report {
    pub(crate) title: String,
    pub(crate) tally: Tally,
    /// CPU time of the server, if its process id was given.
    pub(crate) server_cpu: Option<Duration>,
    /// Further lines.
    pub(crate) notes: Vec<String>,
}

impl Report {
    /// Returns the server's CPU microseconds per answered call.
    pub(crate) fn cpu_per_call(&self) -> Option<f64> {
        let cpu = self.server_cpu?;
        (self.tally.answered > 0).then(|| cpu.as_secs_f64() * 1e6 / self.tally.answered as f64)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { latency, answered, failed, .. } = &self.tally;
        writeln!(f, "{}: {answered} answered, {:.0}/s", self.title, self.tally.per_second())?;
        if *answered > 0 {
            write!(f, "  latency ms")?;
            for (name, quantile) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)] {
                write!(f, "  {name} {:.2}", latency.value_at_quantile(quantile) as f64 / 1e3)?;
            }
            writeln!(f, "  max {:.2}", latency.max() as f64 / 1e3)?;
        }
        if let Some(cpu) = self.cpu_per_call() {
            writeln!(f, "  server CPU {cpu:.1} µs per call")?;
        }
        for (code, count) in failed {
            writeln!(f, "  failed {count} {code}")?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))
    }
}
