//! The retry policies: whether a client may repeat a call whose outcome is unknown, for example
//! because its connection was lost. A row of the method table names the policy. A call that the
//! server refused without any effect (`RateLimited`, `Unavailable`) may be repeated under every
//! policy.

use crate::v1::{
    BatchEnqueueRequest, EnqueueRequest, RelayBatchEnqueueRequest, RelayEnqueueRequest,
};

/// The policy as a value, for tables and documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetryPolicy {
    /// Every call may be repeated.
    Idempotent,
    /// A call may be repeated if each of its messages has an idempotency key.
    ById,
    /// No call may be repeated.
    Once,
}

impl RetryPolicy {
    /// All policies, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Idempotent, Self::ById, Self::Once];

    /// Returns the name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idempotent => "idempotent",
            Self::ById => "by id",
            Self::Once => "once",
        }
    }

    /// Returns the meaning in one sentence.
    pub const fn doc(self) -> &'static str {
        match self {
            Self::Idempotent => "Every call may be repeated.",
            Self::ById => "A call may be repeated if each of its messages has a `message_id`.",
            Self::Once => "No call may be repeated: it is bound to its connection.",
        }
    }
}

/// A marker for the retry policy of a method with request `R`. The row of a method whose request
/// has no idempotency key cannot name [`ById`].
pub trait Retry<R>: 'static {
    /// The policy that this type marks.
    const POLICY: RetryPolicy;

    /// Returns whether a call with this request may be repeated.
    fn is_repeatable(request: &R) -> bool;
}

/// A request whose messages can have idempotency keys.
pub trait Identified {
    /// Returns whether each message of the request has an idempotency key.
    fn has_ids(&self) -> bool;
}

/// Marks methods of [`RetryPolicy::Idempotent`].
#[derive(Debug)]
pub enum Idempotent {}

/// Marks methods of [`RetryPolicy::ById`].
#[derive(Debug)]
pub enum ById {}

/// Marks methods of [`RetryPolicy::Once`].
#[derive(Debug)]
pub enum Once {}

impl<R> Retry<R> for Idempotent {
    const POLICY: RetryPolicy = RetryPolicy::Idempotent;

    fn is_repeatable(_: &R) -> bool {
        true
    }
}

impl<R: Identified> Retry<R> for ById {
    const POLICY: RetryPolicy = RetryPolicy::ById;

    fn is_repeatable(request: &R) -> bool {
        request.has_ids()
    }
}

impl<R> Retry<R> for Once {
    const POLICY: RetryPolicy = RetryPolicy::Once;

    fn is_repeatable(_: &R) -> bool {
        false
    }
}

impl Identified for EnqueueRequest {
    fn has_ids(&self) -> bool {
        !self.message_id.is_empty()
    }
}

impl Identified for BatchEnqueueRequest {
    fn has_ids(&self) -> bool {
        if self.messages.is_empty() {
            !self.message_id.is_empty()
        } else {
            self.messages.iter().all(Identified::has_ids)
        }
    }
}

impl Identified for RelayEnqueueRequest {
    fn has_ids(&self) -> bool {
        !self.message_id.is_empty()
    }
}

impl Identified for RelayBatchEnqueueRequest {
    fn has_ids(&self) -> bool {
        !self.message_id.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Method,
        methods::{BatchEnqueue, Enqueue, OpaqueLoginFinish, Peek},
        v1,
    };

    fn is_repeatable<M: Method>(request: &M::Request) -> bool {
        M::Retry::is_repeatable(request)
    }

    #[test]
    fn sends_without_ids_are_not_repeatable() {
        let identified =
            EnqueueRequest { message_id: vec![1; 16].into(), ..EnqueueRequest::default() };
        let anonymous = EnqueueRequest::default();
        assert!(is_repeatable::<Enqueue>(&identified));
        assert!(!is_repeatable::<Enqueue>(&anonymous));
        let list = |messages| BatchEnqueueRequest { messages, ..BatchEnqueueRequest::default() };
        assert!(is_repeatable::<BatchEnqueue>(&list(vec![identified.clone()])));
        assert!(!is_repeatable::<BatchEnqueue>(&list(vec![identified, anonymous])));
        assert!(!is_repeatable::<BatchEnqueue>(&BatchEnqueueRequest::default()));
    }

    #[test]
    fn a_message_to_many_and_a_commit_are_repeatable_with_an_id() {
        for commit in [false, true] {
            let anonymous = BatchEnqueueRequest { commit, ..BatchEnqueueRequest::default() };
            let identified =
                BatchEnqueueRequest { message_id: vec![1; 16].into(), ..anonymous.clone() };
            assert!(is_repeatable::<BatchEnqueue>(&identified), "commit: {commit}");
            assert!(!is_repeatable::<BatchEnqueue>(&anonymous), "commit: {commit}");
        }
    }

    #[test]
    fn a_call_that_is_bound_to_its_connection_is_not_repeatable() {
        assert!(!is_repeatable::<OpaqueLoginFinish>(&v1::OpaqueLoginFinishRequest::default()));
        assert!(is_repeatable::<Peek>(&v1::PeekRequest::default()));
    }
}
