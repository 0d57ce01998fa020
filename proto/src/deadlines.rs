//! The time limits of calls. A row of the method table names its class. The server stops the
//! handler at the limit and returns `DeadlineExceeded`; the client stops waiting a little later.

use std::time::Duration;

/// The time that FetchWait has in addition to the requested wait.
const WAIT_GRACE: Duration = Duration::from_secs(5);

/// The class of a method's time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadlineClass {
    /// 5 s: a healthy server answers quickly.
    Health,
    /// 30 s.
    Standard,
    /// 120 s: a chunk over a slow connection.
    Blob,
    /// The requested wait plus 5 s.
    Wait,
}

impl DeadlineClass {
    /// All classes, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Health, Self::Standard, Self::Blob, Self::Wait];

    /// Returns the time limit of a call. `requested` is the wait that the request asks for; only
    /// [`DeadlineClass::Wait`] adds it.
    pub const fn duration(self, requested: Duration) -> Duration {
        match self {
            Self::Health => Duration::from_secs(5),
            Self::Standard => Duration::from_secs(30),
            Self::Blob => Duration::from_secs(120),
            Self::Wait => requested.saturating_add(WAIT_GRACE),
        }
    }

    /// Returns the name in tables.
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
    fn only_the_wait_class_adds_the_requested_wait() {
        let requested = Duration::from_secs(60);
        let limits = DeadlineClass::ALL.map(|class| class.duration(requested).as_secs());
        assert_eq!(limits, [5, 30, 120, 65]);
        assert_eq!(DeadlineClass::Wait.duration(Duration::MAX), Duration::MAX);
    }
}
