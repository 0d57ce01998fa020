//! The removal of expired uploads and references, and of files without a use.

use qpq_domain::UnixMillis;
use qpq_ports::{Collected, StoreResult};

use super::statements::{BATCH, ForgetFiles, SweepReferences, SweepUploads, trash_after};
use crate::{error::read_failed, row::millis, store::EmbeddedStore};

pub(super) const DUE: &str =
    "SELECT object FROM blob_trash WHERE not_before <= ?1 ORDER BY not_before LIMIT +?2";

/// Removes one batch of each kind.
pub(super) async fn run(store: &EmbeddedStore, now: UnixMillis) -> StoreResult<Collected> {
    let bounds = store.memory.clock.bounds(now);
    let (now, trash_after) = (bounds.earliest, trash_after(bounds.latest));
    let uploads = store.writer.run(SweepUploads { now, trash_after }).await?;
    let references = store.writer.run(SweepReferences { now, trash_after }).await?;
    let objects: Vec<String> = sqlx::query_scalar(DUE)
        .bind(millis(now))
        .bind(BATCH)
        .fetch_all(&store.readers)
        .await
        .map_err(read_failed)?;
    let removed = objects.len() as u64;
    if removed > 0 {
        // The rows are removed last, so that a crash leaves no file without a row.
        store.blobs.remove(objects.clone()).await?;
        store.writer.run(ForgetFiles { objects }).await?;
    }
    Ok(Collected { uploads, references, objects: removed })
}
