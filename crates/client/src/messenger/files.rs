//! Files: encrypted and uploaded as blobs, and described in a message that has the key.
//!
//! The key of an upload is saved under the hash of the file until the message is saved. So an
//! upload that was interrupted, also by a crash, is encrypted in the same way again, and continues
//! at the bytes that the server has.

use std::path::Path;

use bytes::Bytes;
use qpq_domain::MAX_BLOB_CHUNK;
use qpq_durable_file::{self as durable_file, Created};
use qpq_mls::{SharedFile, database::DatabaseError};
use qpq_proto::{methods, v1};
use rand::{RngCore as _, rngs::OsRng};
use sha2::{Digest as _, Sha256};

use super::{Messenger, log::ConversationId, send::Sent, state::State, tables::UPLOADS};
use crate::{
    error::{CallError, Error},
    file_cipher::{self, Opener, SEALED_SEGMENT},
};

/// The maximum size of an encrypted file, in bytes: that of a blob.
const MAX_BLOB: u64 = 50 << 20;

/// The maximum number of interrupted uploads that can be continued. Beyond it, all are forgotten.
const MAX_UPLOADS: u64 = 64;

/// The maximum number of calls without progress: another device may be uploading the same file.
const MAX_STALLS: u32 = 5;

/// The permissions of a saved file.
const MODE: u32 = 0o600;

/// A file to send.
#[derive(Clone)]
pub struct NewFile {
    /// The name, without directories, of at most [`SharedFile::MAX_NAME`] bytes.
    pub name: String,
    /// The MIME type, of at most [`SharedFile::MAX_MIME`] bytes; may be empty.
    pub mime: String,
    /// The width and the height in pixels, if the file is a picture.
    pub picture: Option<(u32, u32)>,
    /// The content.
    pub content: Vec<u8>,
}

impl std::fmt::Debug for NewFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewFile").field("size", &self.content.len()).finish_non_exhaustive()
    }
}

/// The treatment of a file that exists at the place where another one is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// The file is kept, and the other one is not saved.
    Keep,
    /// The file is replaced.
    Replace,
}

impl Messenger {
    /// Encrypts and uploads a file, and sends a message about it to everyone in a conversation.
    /// `progress` receives the uploaded bytes and their total.
    ///
    /// An upload that was interrupted continues when the same file is sent again.
    pub async fn send_file(
        &self,
        conversation: ConversationId,
        file: NewFile,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<Sent, Error> {
        let size = file.content.len() as u64;
        if file_cipher::sealed_size(size).is_none_or(|sealed| sealed > MAX_BLOB) {
            let tags = MAX_BLOB.div_ceil(SEALED_SEGMENT as u64) * 16;
            return Err(Error::FileTooLarge { size, max: MAX_BLOB - tags });
        }
        // Before the upload, because a conversation that cannot be written to needs no file.
        self.prepare_to_send(conversation).await?;
        let NewFile { name, mime, picture, content } = file;
        let digest: [u8; 32] = Sha256::digest(&content).into();
        let key = self.store().change(move |state| Ok(state.upload_key(&digest)?)).await?;
        let sealing = move || {
            let sealed = file_cipher::seal(&key, &content);
            let blob: [u8; 32] = Sha256::digest(&sealed).into();
            (Bytes::from(sealed), blob)
        };
        let (sealed, blob) =
            tokio::task::spawn_blocking(sealing).await.expect("sealing does not panic");
        self.upload(&blob, &sealed, &progress).await?;
        let shared = SharedFile { name, size, mime, blob, key, picture };
        self.send_uploaded(conversation, shared, digest).await
    }

    /// Uploads a blob, from the position on at which an earlier upload stopped.
    async fn upload(
        &self,
        blob: &[u8; 32],
        sealed: &Bytes,
        progress: &(impl Fn(u64, u64) + Send + Sync),
    ) -> Result<(), Error> {
        let total = sealed.len() as u64;
        let chunk = |chunk: Bytes, offset: u64| v1::UploadBlobRequest {
            blob_hash: Bytes::copy_from_slice(blob),
            chunk,
            offset,
            total_size: total,
            ..Default::default()
        };
        let question = || chunk(Bytes::new(), 0);
        let mut answer = self.client().call::<methods::UploadBlob>(question()).await?;
        let mut stalls = 0;
        while answer.blob_id != blob[..] {
            let received = answer.received.min(total);
            progress(received, total);
            let begin = usize::try_from(received).unwrap_or(sealed.len());
            let end = (begin + MAX_BLOB_CHUNK).min(sealed.len());
            let request = chunk(sealed.slice(begin..end), received);
            answer = match self.client().call::<methods::UploadBlob>(request).await {
                Ok(answer) if answer.received > received || !answer.blob_id.is_empty() => answer,
                Ok(_) if stalls < MAX_STALLS => {
                    stalls += 1;
                    self.client().call::<methods::UploadBlob>(question()).await?
                }
                Ok(_) => return Err(CallError::Malformed { method: "UploadBlob" }.into()),
                // The server has another number of bytes than it returned: the upload has expired.
                Err(error) if error.is_code("blob.gap") && stalls < MAX_STALLS => {
                    stalls += 1;
                    self.client().call::<methods::UploadBlob>(question()).await?
                }
                Err(error) => return Err(error.into()),
            };
        }
        progress(total, total);
        Ok(())
    }

    /// Downloads a file, checks that it is the one that was sent, and writes it to `to`, which is
    /// complete or absent also after a crash. `progress` receives the downloaded bytes and their
    /// total.
    pub async fn save_file(
        &self,
        file: &SharedFile,
        to: &Path,
        existing: Existing,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<(), Error> {
        if existing == Existing::Keep && to.exists() {
            return Err(Error::FileExists(to.to_owned()));
        }
        let content = self.download(file, &progress).await?;
        let path = to.to_owned();
        let writing = move || match existing {
            Existing::Replace => {
                durable_file::replace(&path, &content, MODE).map(|()| Created::New)
            }
            Existing::Keep => durable_file::create(&path, &content, MODE),
        };
        let written = tokio::task::spawn_blocking(writing).await.expect("writing does not panic");
        match written {
            Ok(Created::New) => Ok(()),
            Ok(Created::Exists) => Err(Error::FileExists(to.to_owned())),
            Err(error) => {
                Err(Error::FileNotWritten { path: to.to_owned(), cause: error.to_string() })
            }
        }
    }

    /// Downloads a file, and verifies each segment as soon as it has arrived.
    async fn download(
        &self,
        file: &SharedFile,
        progress: &(impl Fn(u64, u64) + Send + Sync),
    ) -> Result<Vec<u8>, Error> {
        let total = file_cipher::sealed_size(file.size).filter(|total| *total <= MAX_BLOB);
        let total = total.ok_or(Error::FileForged)?;
        let (mut opener, mut hash) = (Opener::new(&file.key), Sha256::new());
        let (mut content, mut pending, mut offset) = (Vec::new(), Vec::new(), 0);
        while offset < total {
            progress(offset, total);
            let request = v1::DownloadBlobRequest {
                blob_id: Bytes::copy_from_slice(&file.blob),
                offset,
                ..Default::default()
            };
            let part = match self.client().call::<methods::DownloadBlob>(request).await {
                Err(error) if error.is_code("blob.not_found") => return Err(Error::FileExpired),
                answered => answered?,
            };
            let fits = part.chunk.len() as u64 <= total - offset && !part.chunk.is_empty();
            if part.total_size != total || !fits {
                return Err(Error::FileForged);
            }
            offset += part.chunk.len() as u64;
            hash.update(&part.chunk);
            pending.extend_from_slice(&part.chunk);
            let mut opened = 0;
            while pending.len() - opened > SEALED_SEGMENT
                || (offset == total && pending.len() > opened)
            {
                let end = (opened + SEALED_SEGMENT).min(pending.len());
                let is_last = offset == total && end == pending.len();
                let segment = &pending[opened..end];
                opener.open(segment, is_last, &mut content).map_err(|_| Error::FileForged)?;
                opened = end;
            }
            pending.drain(..opened);
        }
        if hash.finalize()[..] != file.blob || content.len() as u64 != file.size {
            return Err(Error::FileForged);
        }
        progress(total, total);
        Ok(content)
    }
}

/// Returns whether the fields of a file have lengths that a client may send.
pub(super) fn is_showable(file: Option<&SharedFile>) -> bool {
    file.is_none_or(|file| {
        file.name.len() <= SharedFile::MAX_NAME && file.mime.len() <= SharedFile::MAX_MIME
    })
}

impl State {
    /// Returns the key for the upload of a file with this hash: that of an interrupted upload, or a
    /// new one.
    fn upload_key(&mut self, content: &[u8; 32]) -> Result<[u8; 32], DatabaseError> {
        let saved = self.database().get(UPLOADS, content)?;
        if let Some(key) = saved.and_then(|key| key[..].try_into().ok()) {
            return Ok(key);
        }
        if self.database().count(UPLOADS)? >= MAX_UPLOADS {
            self.database().delete_where(UPLOADS, |_| true)?;
        }
        let mut key = [0; 32];
        OsRng.fill_bytes(&mut key);
        self.database().put(UPLOADS, content, None, &key)?;
        Ok(key)
    }

    /// Forgets the key of an upload, which the saved message has.
    pub(super) fn forget_upload(&mut self, content: &[u8; 32]) -> Result<(), DatabaseError> {
        self.database().delete(UPLOADS, content).map(drop)
    }
}
