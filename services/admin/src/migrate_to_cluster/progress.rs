//! The progress of a transfer, on standard error. A transfer of less than a second prints nothing.

use std::io::{self, IsTerminal as _};

use tokio::time::{Duration, Instant};

use crate::print_note;

/// The time before the first line.
const FIRST_LINE_AFTER: Duration = Duration::from_secs(1);

/// A counter of rows that prints a line at intervals.
#[derive(Debug)]
pub(super) struct Progress {
    done: &'static str,
    rows: u64,
    total: Option<u64>,
    next_line: Instant,
    /// The time between two lines: shorter on a terminal than in a log file.
    interval: Duration,
}

impl Progress {
    /// Creates a counter. `done` is the participle of a line, as in "12 rows read".
    pub(super) fn new(done: &'static str) -> Self {
        let interval = Duration::from_secs(if io::stderr().is_terminal() { 1 } else { 10 });
        Self { done, rows: 0, total: None, next_line: Instant::now() + FIRST_LINE_AFTER, interval }
    }

    /// Sets the total number of rows.
    pub(super) fn of(mut self, rows: u64) -> Self {
        self.total = Some(rows);
        self
    }

    /// Counts one row.
    pub(super) fn row(&mut self) {
        self.rows(1);
    }

    /// Counts `rows` rows.
    pub(super) fn rows(&mut self, rows: u64) {
        self.rows += rows;
        let now = Instant::now();
        if now >= self.next_line {
            self.next_line = now + self.interval;
            print_note(self.line());
        }
    }

    fn line(&self) -> String {
        let Self { done, rows, total, .. } = self;
        match total {
            Some(total) => {
                format!("{rows} of {total} rows {done} ({}%)", rows * 100 / total.max(&1))
            }
            None => format!("{rows} rows {done}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_contains_rows_total_and_percentage() {
        let mut progress = Progress::new("read");
        progress.row();
        assert_eq!(progress.line(), "1 rows read");
        let mut progress = Progress::new("transferred").of(200);
        progress.rows(50);
        assert_eq!(progress.line(), "50 of 200 rows transferred (25%)");
        assert_eq!(Progress::new("read").of(0).line(), "0 of 0 rows read (0%)");
    }
}
