//! The SQL of the message tables.
//!
//! A message is a row, found by its inbox and seq. The head of the inbox (last seq, count, bytes)
//! is another row, which triggers update. `enqueue` accepts messages, `read` takes snapshots,
//! `position` records the messages that devices have completed, and `remove` deletes messages and
//! remembers their ids.
//!
//! An expired message counts as removed, whether or not a sweep has deleted it: it is not returned
//! and not counted as acked, and its id is remembered from its expiry on. So the answers do not
//! depend on the time of a sweep.

pub(crate) mod enqueue;
mod left_out;
#[cfg(test)]
mod plans;
pub(crate) mod position;
pub(crate) mod read;
pub(crate) mod remove;
