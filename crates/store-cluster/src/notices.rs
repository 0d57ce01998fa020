//! Notices between edges, over NATS.

use futures_util::stream::{self, BoxStream};
use qpq_domain::IdentityKey;
use qpq_ports::{Notice, Notices};
use tokio::sync::broadcast::error::RecvError;

use crate::nats::{Bus, Heard};

/// The port over the bus.
#[derive(Debug)]
pub(crate) struct ClusterNotices(pub(crate) Bus);

impl Notices for ClusterNotices {
    fn publish(&self, identity: &IdentityKey, notice: Notice) {
        self.0.notice(*identity, notice);
    }

    fn listen(&self) -> BoxStream<'static, (IdentityKey, Notice)> {
        Box::pin(stream::unfold(self.0.hear(), |mut heard| async {
            loop {
                match heard.recv().await {
                    Ok(Heard::Notice(identity, notice)) => return Some(((identity, notice), heard)),
                    // Whoever should have heard one that was missed finds out by its own checks.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        }))
    }
}
