//! The inbox: sending to it (200, 205) and reading it (201 to 204).
//!
//! Every session can send to any account; only the owner reads. A message is durable when its
//! sender's call is answered Ok. A message that is read destructively is removed only once the
//! transport confirms that the client has the whole answer: the lease is part of the answer, and
//! dropping the answer releases it.

mod ack;
mod batch_enqueue;
mod enqueue;
mod fetch;
mod fetch_wait;
pub(super) mod group_message;
mod message;
mod page;
mod peek;
mod read;
