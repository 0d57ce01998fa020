//! How long a call may take before it is answered `DeadlineExceeded`. A row of the method table
//! names its class; the server stops the handler by it, the client stops waiting a little later.

use std::time::Duration;

/// What FetchWait gets beyond the time that it was asked to wait.
const WAIT_GRACE: Duration = Duration::from_secs(5);

/// A method's time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadlineClass {
    /// 5 s: what does not answer at once is not healthy.
    Health,
    /// 30 s.
    Standard,
    /// 120 s: a chunk over a slow line.
    Blob,
    /// The request's own timeout and 5 s more.
    Wait,
}

impl DeadlineClass {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Health, Self::Standard, Self::Blob, Self::Wait];

    /// The time limit of a call. `asked` is how long the request itself asks to wait: zero for all
    /// but [`DeadlineClass::Wait`], where it is added.
    pub const fn duration(self, asked: Duration) -> Duration {
        match self {
            Self::Health => Duration::from_secs(5),
            Self::Standard => Duration::from_secs(30),
            Self::Blob => Duration::from_secs(120),
            Self::Wait => asked.saturating_add(WAIT_GRACE),
        }
    }

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Health => "health",
            Self::Standard => "standard",
            Self::Blob => "blob",
            Self::Wait => "wait",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_wait_depends_on_what_was_asked() {
        let asked = Duration::from_secs(60);
        let limits = DeadlineClass::ALL.map(|class| class.duration(asked).as_secs());
        assert_eq!(limits, [5, 30, 120, 65]);
        assert_eq!(DeadlineClass::Wait.duration(Duration::MAX), Duration::MAX);
    }
}
