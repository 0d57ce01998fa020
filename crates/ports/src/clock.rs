//! The source of the time.

use qpq_domain::UnixMillis;

/// A source of the time. Tests and simulations have their own.
pub trait Clock: Send + Sync + 'static {
    /// Returns the present instant.
    fn now(&self) -> UnixMillis;
}

/// The operating system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the clock of the machine"
    )]
    fn now(&self) -> UnixMillis {
        let since_epoch =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        UnixMillis::default().plus(since_epoch)
    }
}
