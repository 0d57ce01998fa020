//! The promises of a cluster, each a test by its name, on real stores: what every call was answered is recorded and judged.

mod acked_never_lost;
mod inboxes;
