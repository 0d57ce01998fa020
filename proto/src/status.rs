//! The status byte of a response, and the `ErrorDetail` in the payload of each status except Ok.

use std::time::Duration;

use prost::Message;

use crate::v1::ErrorDetail;

/// The first byte of a response frame. 6 and 7 are reserved. A client decodes numbers of later
/// versions as [`Status::Unknown`]; a server never sends it. [`Status::doc`] describes each status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "`doc` describes each status, also in docs/rpc.md")]
pub enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    RateLimited,
    DeadlineExceeded,
    Unavailable,
    Internal,
    UnknownMethod,
    /// A number that this version does not know.
    Unknown(u8),
}

impl Status {
    /// All known statuses, by number.
    pub const ALL: [Self; 10] = [
        Self::Ok,
        Self::BadRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::RateLimited,
        Self::DeadlineExceeded,
        Self::Unavailable,
        Self::Internal,
        Self::UnknownMethod,
    ];

    /// Returns the byte on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::BadRequest => 1,
            Self::Unauthorized => 2,
            Self::Forbidden => 3,
            Self::NotFound => 4,
            Self::RateLimited => 5,
            Self::DeadlineExceeded => 8,
            Self::Unavailable => 9,
            Self::Internal => 10,
            Self::UnknownMethod => 11,
            Self::Unknown(code) => code,
        }
    }

    /// Returns the name in documents, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "Ok",
            Self::BadRequest => "BadRequest",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "NotFound",
            Self::RateLimited => "RateLimited",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::Unavailable => "Unavailable",
            Self::Internal => "Internal",
            Self::UnknownMethod => "UnknownMethod",
            Self::Unknown(_) => "Unknown",
        }
    }

    /// Returns the meaning for the caller, in one sentence.
    pub const fn doc(self) -> &'static str {
        match self {
            Self::Ok => "The call succeeded; the payload is the method's response.",
            Self::BadRequest => {
                "The request is malformed or breaks a rule; a repetition fails again."
            }
            Self::Unauthorized => "No session, an ended session, or a wrong password: log in.",
            Self::Forbidden => "The caller is authenticated but not allowed to do this.",
            Self::NotFound => "The object that the request names does not exist.",
            Self::RateLimited => "Too many calls, or a full inbox: wait `retry_after_ms`.",
            Self::DeadlineExceeded => "The call exceeded its deadline; it may have had its effect.",
            Self::Unavailable => "The server cannot serve the call now: wait `retry_after_ms`.",
            Self::Internal => "An error in the server.",
            Self::UnknownMethod => "The server does not serve this method.",
            Self::Unknown(_) => "A status of a later version.",
        }
    }

    /// Returns whether the same request may succeed later. The method's retry policy determines
    /// whether the client may repeat it.
    pub const fn is_temporary(self) -> bool {
        matches!(
            self,
            Self::RateLimited | Self::DeadlineExceeded | Self::Unavailable | Self::Internal
        )
    }
}

impl From<u8> for Status {
    fn from(code: u8) -> Self {
        match code {
            0 => Self::Ok,
            1 => Self::BadRequest,
            2 => Self::Unauthorized,
            3 => Self::Forbidden,
            4 => Self::NotFound,
            5 => Self::RateLimited,
            8 => Self::DeadlineExceeded,
            9 => Self::Unavailable,
            10 => Self::Internal,
            11 => Self::UnknownMethod,
            other => Self::Unknown(other),
        }
    }
}

impl From<Status> for u8 {
    fn from(status: Status) -> Self {
        status.code()
    }
}

impl ErrorDetail {
    /// Creates a detail with a fixed `code`, which begins with the area, and a fixed English
    /// `message`.
    pub fn new(code: &'static str, message: &'static str) -> Self {
        Self { code: code.into(), message: message.into(), ..Self::default() }
    }

    /// Sets the time to wait before a retry, at least one millisecond.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX).max(1);
        self
    }

    /// Sets the name of the refused request field.
    #[must_use]
    pub fn with_field(mut self, field: &'static str) -> Self {
        self.field = field.into();
        self
    }

    /// Sets the present epoch of the group.
    #[must_use]
    pub fn with_epoch(mut self, epoch: u64) -> Self {
        self.epoch = epoch;
        self
    }

    /// Returns the time to wait before a retry, if the server set one.
    pub fn retry_after(&self) -> Option<Duration> {
        (self.retry_after_ms > 0).then(|| Duration::from_millis(self.retry_after_ms.into()))
    }

    /// Decodes the payload of a refusal. Returns an empty detail for a malformed payload, which
    /// another implementation may send; then only the status is known.
    pub fn from_payload(payload: &[u8]) -> Self {
        Self::decode(payload).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_converts_to_a_status_and_back() {
        for code in 0..=u8::MAX {
            assert_eq!(Status::from(code).code(), code);
            let named = !matches!(Status::from(code), Status::Unknown(_));
            assert_eq!(named, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11].contains(&code), "{code}");
        }
        assert_eq!(Status::ALL.map(Status::code), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]);
    }

    #[test]
    fn only_limits_deadlines_and_server_failures_are_temporary() {
        let temporary: Vec<_> =
            (0..=u8::MAX).filter(|code| Status::from(*code).is_temporary()).collect();
        assert_eq!(temporary, [5, 8, 9, 10]);
    }

    #[test]
    fn a_detail_round_trips_and_a_malformed_payload_yields_an_empty_one() {
        let detail = ErrorDetail::new("delivery.queue_full", "The inbox is full.")
            .with_retry_after(Duration::from_millis(1500))
            .with_field("recipient_key");
        let back = ErrorDetail::from_payload(&detail.encode_to_vec());
        assert_eq!(back, detail);
        assert_eq!(back.retry_after(), Some(Duration::from_millis(1500)));
        assert_eq!(ErrorDetail::from_payload(b"\xff\xff"), ErrorDetail::default());
        assert_eq!(ErrorDetail::default().retry_after(), None);
    }

    #[test]
    fn a_retry_time_is_at_least_one_millisecond_and_does_not_overflow() {
        let detail = ErrorDetail::new("c", "m");
        assert_eq!(detail.clone().with_retry_after(Duration::ZERO).retry_after_ms, 1);
        assert_eq!(detail.with_retry_after(Duration::MAX).retry_after_ms, u32::MAX);
    }
}
