//! The inbox: sending to it (200, 205) and reading it (201 to 204).
//!
//! Anyone with a session sends to any account; only the owner reads. What is answered Ok is
//! durable, and what is read destructively is gone only once the transport says that the client has
//! the whole answer: the lease travels with the answer, and dropping the one drops the other.

mod batch;
mod enqueue;
mod page;
mod read;
