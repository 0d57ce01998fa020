//! Shows the user the reason for a wait that is longer than a second.

use std::{future::Future, io::IsTerminal as _, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::Format;

/// The time after which progress is shown.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whether progress is shown: only to a person at a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    Shown,
    Silent,
}

impl Progress {
    pub(crate) fn new(format: Format) -> Self {
        if format == Format::Human && std::io::stderr().is_terminal() {
            Self::Shown
        } else {
            Self::Silent
        }
    }

    /// Runs `work`. If `work` takes long, shows a spinner with `what` on standard error until the
    /// end.
    pub(crate) async fn during<T>(self, what: &'static str, work: impl Future<Output = T>) -> T {
        if self == Self::Silent {
            return work.await;
        }
        let mut work = std::pin::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(PATIENCE) => {}
        }
        let spinner = ProgressBar::new_spinner().with_message(what);
        spinner.set_style(
            ProgressStyle::with_template("{spinner} {msg}… {elapsed}")
                .expect("the template is valid"),
        );
        spinner.enable_steady_tick(Duration::from_millis(100));
        let _cleared = Cleared(spinner);
        work.await
    }
}

impl Progress {
    /// Returns a bar for the bytes of a file. Empty until it is set for the first time.
    pub(crate) fn bytes(self, what: &'static str) -> Bar {
        let bar = match self {
            Self::Silent => ProgressBar::hidden(),
            Self::Shown => ProgressBar::new(0).with_message(what).with_style(
                ProgressStyle::with_template(
                    "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}",
                )
                .expect("the template is valid"),
            ),
        };
        Bar(Cleared(bar))
    }
}

/// A bar for the bytes of a file, removed when it is dropped.
pub(crate) struct Bar(Cleared);

impl Bar {
    /// Sets the number of bytes that are done, and their total.
    pub(crate) fn set(&self, done: u64, total: u64) {
        let Cleared(bar) = &self.0;
        bar.set_length(total);
        bar.set_position(done);
    }
}

/// Removes the spinner or the bar, also when the work is dropped.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
