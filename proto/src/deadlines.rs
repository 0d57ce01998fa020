//! The time limits of calls. A row of the method table names its class. The server stops the
//! handler at the limit and returns `DeadlineExceeded`; the client stops waiting a little later.

use std::time::Duration;

use crate::v1::FetchWaitRequest;

/// The time limit of FetchWait in addition to the requested wait.
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

/// A marker for the deadline class of a method with request `R`. The row of a method whose request
/// contains no time to wait cannot name [`Wait`].
pub trait Deadline<R>: 'static {
    /// The class that this type marks.
    const CLASS: DeadlineClass;

    /// Returns the requested time to wait in milliseconds, 0 for the server's default. `None` if
    /// the method does not wait.
    fn requested_wait(request: &R) -> Option<u64>;
}

/// A request that contains a time to wait.
pub trait Waits {
    /// Returns the requested time to wait in milliseconds, 0 for the server's default.
    fn timeout_ms(&self) -> u64;
}

macro_rules! markers {
    ($($name:ident)+) => {$(
        #[doc = concat!("Marks methods of [`DeadlineClass::", stringify!($name), "`].")]
        #[derive(Debug)]
        pub enum $name {}

        impl<R> Deadline<R> for $name {
            const CLASS: DeadlineClass = DeadlineClass::$name;

            fn requested_wait(_: &R) -> Option<u64> {
                None
            }
        }
    )+};
}

markers! { Health Standard Blob }

/// Marks methods of [`DeadlineClass::Wait`].
#[derive(Debug)]
pub enum Wait {}

impl<R: Waits> Deadline<R> for Wait {
    const CLASS: DeadlineClass = DeadlineClass::Wait;

    fn requested_wait(request: &R) -> Option<u64> {
        Some(request.timeout_ms())
    }
}

impl Waits for FetchWaitRequest {
    fn timeout_ms(&self) -> u64 {
        self.timeout_ms
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
