//! Blobs, ids 600 and 601.

mod download_blob;
mod upload_blob;
