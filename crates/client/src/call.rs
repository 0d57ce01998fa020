//! The encoding of one call: the request with its session token, and the answer as a message or a
//! [`ServerError`]. Also the time limit of a call, and whether it may be repeated.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use qpq_domain::SessionToken;
use qpq_proto::{
    AuthKind, Method, Status, deadlines::Deadline as _, retry::Retry as _,
    session::append_session_token, v1::ErrorDetail,
};

use crate::error::{CallError, ServerError};

/// The time that the client waits longer than the server, so that the server's own answer to a late
/// call arrives.
const GRACE: Duration = Duration::from_secs(2);
/// The waiting time of a FetchWait that states none.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// The maximum waiting time of a FetchWait.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The size of field 15: its key, its length, the token.
const TOKEN_ROOM: usize = 2 + SessionToken::LEN;

/// Encodes a request, with the session token if there is one and the method needs a session.
pub(crate) fn encode<M: Method>(
    request: &M::Request,
    token: Option<&SessionToken>,
) -> Result<Bytes, CallError> {
    let token = token.filter(|_| M::INFO.auth != AuthKind::Anonymous);
    let mut payload = BytesMut::with_capacity(request.encoded_len() + TOKEN_ROOM);
    request.encode(&mut payload).expect("the buffer grows as needed");
    if let Some(token) = token {
        append_session_token(&mut payload, token.expose());
    }
    let max = M::INFO.largest_request.bytes() as usize;
    if payload.len() > max {
        return Err(CallError::TooLarge { size: payload.len(), max });
    }
    Ok(payload.freeze())
}

/// Decodes the content of a response frame.
pub(crate) fn decode<M: Method>(status: u8, payload: Bytes) -> Result<M::Response, CallError> {
    match Status::from(status) {
        Status::Ok => {
            M::Response::decode(payload).map_err(|_| CallError::Malformed { method: M::INFO.name })
        }
        status => Err(ServerError::new(status, ErrorDetail::from_payload(&payload)).into()),
    }
}

/// Returns the time limit of one attempt.
pub(crate) fn time_limit<M: Method>(request: &M::Request) -> Duration {
    let wait = match M::Deadline::requested_wait(request) {
        Some(0) => DEFAULT_WAIT,
        Some(timeout_ms) => Duration::from_millis(timeout_ms).min(MAX_WAIT),
        None => Duration::ZERO,
    };
    M::INFO.deadline.duration(wait) + GRACE
}

/// Whether a call whose outcome is unknown can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    Safe,
    /// The call could take effect twice, or is bound to its connection.
    Unsafe,
}

/// Returns whether a call with `request` may be repeated, by the retry policy of `M`.
pub(crate) fn repeat<M: Method>(request: &M::Request) -> Repeat {
    if M::Retry::is_repeatable(request) { Repeat::Safe } else { Repeat::Unsafe }
}

#[cfg(test)]
mod tests {
    use qpq_proto::{methods, v1};

    use super::*;

    #[test]
    fn only_requests_that_need_a_session_have_the_token_in_field_15() {
        let token = SessionToken::new([9; 32]);
        let request =
            v1::EnqueueRequest { payload: Bytes::from_static(b"hi"), ..Default::default() };
        let bytes = encode::<methods::Enqueue>(&request, Some(&token)).unwrap();
        let back = v1::EnqueueRequest::decode(bytes).unwrap();
        assert_eq!((&back.payload[..], &back.session_token[..]), (&b"hi"[..], &[9; 32][..]));
        assert!(encode::<methods::Health>(&v1::HealthRequest {}, Some(&token)).unwrap().is_empty());
        assert!(!encode::<methods::Enqueue>(&request, None).unwrap().is_empty());
    }

    #[test]
    fn requests_beyond_the_frame_size_are_refused_before_sending() {
        let max = qpq_wire::MAX_PAYLOAD as usize;
        let of = |len| v1::EnqueueRequest { payload: vec![0; len].into(), ..Default::default() };
        assert!(encode::<methods::Enqueue>(&of(max - 16), None).is_ok());
        let refused = encode::<methods::Enqueue>(&of(max), None).err();
        assert!(matches!(refused, Some(CallError::TooLarge { .. })));
    }

    #[test]
    fn a_refusal_keeps_the_message_of_the_server() {
        let detail = ErrorDetail::new("delivery.queue_full", "The inbox is full.")
            .with_retry_after(Duration::from_secs(1))
            .with_field("recipient_key");
        let answer = decode::<methods::Enqueue>(5, detail.encode_to_vec().into()).unwrap_err();
        let CallError::Server(error) = answer else { panic!("{answer:?}") };
        assert_eq!(
            (error.status, error.code.as_str()),
            (Status::RateLimited, "delivery.queue_full")
        );
        assert_eq!(error.retry_after, Some(Duration::from_secs(1)));
        assert_eq!(error.field.as_deref(), Some("recipient_key"));
    }

    #[test]
    fn only_a_wait_has_the_time_limit_that_it_requests() {
        let wait = |timeout_ms| {
            time_limit::<methods::FetchWait>(&v1::FetchWaitRequest {
                timeout_ms,
                ..Default::default()
            })
        };
        assert_eq!(wait(0), Duration::from_secs(37));
        assert_eq!(wait(1_000), Duration::from_secs(8));
        assert_eq!(wait(u64::MAX), Duration::from_secs(67));
        assert_eq!(time_limit::<methods::Health>(&v1::HealthRequest {}), Duration::from_secs(7));
    }

    #[test]
    fn repeats_follow_the_retry_policy_of_the_row() {
        let identified =
            v1::EnqueueRequest { message_id: vec![1; 16].into(), ..Default::default() };
        assert_eq!(repeat::<methods::Enqueue>(&identified), Repeat::Safe);
        assert_eq!(repeat::<methods::Enqueue>(&Default::default()), Repeat::Unsafe);
        assert_eq!(repeat::<methods::OpaqueLoginFinish>(&Default::default()), Repeat::Unsafe);
        assert_eq!(repeat::<methods::Peek>(&Default::default()), Repeat::Safe);
    }
}
