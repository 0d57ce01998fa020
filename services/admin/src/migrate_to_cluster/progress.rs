//! How far a move is, on standard error: nothing if it takes less than a second.

use std::io::{self, IsTerminal as _};

use tokio::time::{Duration, Instant};

use crate::note;

/// Before the first line.
const PATIENCE: Duration = Duration::from_secs(1);

/// Counts rows and now and then says how many.
#[derive(Debug)]
pub(super) struct Progress {
    did: &'static str,
    rows: u64,
    of: Option<u64>,
    next: Instant,
    /// Between two lines: somebody watches, or somebody will read them all.
    pause: Duration,
}

impl Progress {
    /// `did` is what is done to rows, as in "12 rows read".
    pub(super) fn new(did: &'static str) -> Self {
        let pause = Duration::from_secs(if io::stderr().is_terminal() { 1 } else { 10 });
        Self { did, rows: 0, of: None, next: Instant::now() + PATIENCE, pause }
    }

    /// How many there will be.
    pub(super) fn of(mut self, rows: u64) -> Self {
        self.of = Some(rows);
        self
    }

    pub(super) fn row(&mut self) {
        self.rows(1);
    }

    pub(super) fn rows(&mut self, rows: u64) {
        self.rows += rows;
        let now = Instant::now();
        if now >= self.next {
            self.next = now + self.pause;
            note(self.line());
        }
    }

    fn line(&self) -> String {
        let Self { did, rows, of, .. } = self;
        match of {
            Some(of) => format!("{rows} of {of} rows {did} ({}%)", rows * 100 / of.max(&1)),
            None => format!("{rows} rows {did}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let mut progress = Progress::new("read");
        progress.row();
        assert_eq!(progress.line(), "1 rows read");
        let mut progress = Progress::new("moved").of(200);
        progress.rows(50);
        assert_eq!(progress.line(), "50 of 200 rows moved (25%)");
        assert_eq!(Progress::new("moved").of(0).line(), "0 of 0 rows moved (0%)");
    }
}
