//! The keys that all edges of a cluster share: for session tickets, Retry tokens and stateless
//! resets. Shared keys allow a client to move from one edge to another.
//!
//! Ticket and token keys are [`KeyRing`]s, reloaded while the server runs when their files change.
//! The reset key is not reloaded: clients have reset tokens for their open connections, which are
//! derived from it, and ignore a reset that is derived from another key. To replace it, restart the
//! edges one after the other.

pub(crate) mod connection_ids;
pub(crate) mod ring;
mod tickets;
mod tokens;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::hmac;
use metrics::counter;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::time::{MissedTickBehavior, interval};
use zeroize::Zeroizing;

use crate::metric::CLUSTER_KEY_RELOADS_FAILED;
use connection_ids::ConnectionIdKey;
use ring::KeyRing;
use tickets::Tickets;
use tokens::Tokens;

/// The length of the reset key, in bytes.
pub const RESET_KEY_LEN: usize = 32;

/// The paths of the key files.
#[derive(Debug, Clone)]
pub struct ClusterKeyFiles {
    /// The [`KeyRing`] of session tickets. Protect the file like the certificate's key: tickets are
    /// readable on the wire, so an attacker with the ring can impersonate the server to clients
    /// that resume.
    pub tickets: PathBuf,
    /// The [`KeyRing`] of Retry tokens, with which a client proves its address.
    pub tokens: PathBuf,
    /// The key of stateless resets.
    pub reset: PathBuf,
}

/// The keys of a cluster, replaced when their files change.
pub struct ClusterKeys {
    files: ClusterKeyFiles,
    pub(crate) tickets: Arc<Tickets>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) reset: hmac::Key,
    /// The digest of the rings that were read last, usable or not. Unusable rings are thus reported
    /// once.
    last_read: Mutex<[u8; 32]>,
}

/// An edge of a cluster.
#[derive(Debug, Clone)]
pub struct ClusterEdge {
    /// The keys that all edges share.
    pub keys: Arc<ClusterKeys>,
    /// A name that no other running edge has.
    ///
    /// An edge restarted with the same name notifies the clients of its previous process at their
    /// next packet that their connections have ended. Without a name, those clients wait for a
    /// timeout.
    pub name: Option<String>,
}

/// The reason why the keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterKeysError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The contents of a file are not keys.
    #[error("{path} is damaged: it does not contain {expected} bytes of keys")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The expected length.
        expected: usize,
    },
}

/// The outcome of [`ClusterKeys::reload`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyReload {
    /// The files have not changed.
    Unchanged,
    /// New tickets and tokens are encrypted with other keys.
    Changed,
}

impl ClusterKeys {
    /// Reads the keys.
    ///
    /// # Errors
    /// [`ClusterKeysError`].
    pub fn load(files: ClusterKeyFiles) -> Result<Arc<Self>, ClusterKeysError> {
        let rings = Rings::read(&files)?;
        let reset = read(&files.reset)?;
        if reset.len() != RESET_KEY_LEN || ring::is_blank(&reset) {
            return Err(ClusterKeysError::Damaged { path: files.reset, expected: RESET_KEY_LEN });
        }
        Ok(Arc::new(Self {
            tickets: Arc::new(Tickets::new(&rings.tickets(&files)?)),
            tokens: Arc::new(Tokens::new(&rings.tokens(&files)?)),
            reset: hmac::Key::new(hmac::HMAC_SHA256, &reset),
            last_read: Mutex::new(rings.digest()),
            files,
        }))
    }

    /// Reads the rings, and replaces the keys if they have changed.
    ///
    /// # Errors
    /// [`ClusterKeysError`]. The old keys stay. The same unusable contents are an error the first
    /// time, and `Unchanged` after that.
    pub fn reload(&self) -> Result<KeyReload, ClusterKeysError> {
        let rings = Rings::read(&self.files)?;
        let mut last_read = self.last_read.lock();
        if std::mem::replace(&mut *last_read, rings.digest()) == rings.digest() {
            return Ok(KeyReload::Unchanged);
        }
        let (tickets, tokens) = (rings.tickets(&self.files)?, rings.tokens(&self.files)?);
        self.tickets.replace(&tickets);
        self.tokens.replace(&tokens);
        Ok(KeyReload::Changed)
    }

    /// Reloads the rings at every interval, forever, as
    /// [`Certificates::watch`](crate::Certificates::watch) does.
    pub async fn watch(self: Arc<Self>, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let keys = Arc::clone(&self);
            let reloaded = tokio::task::spawn_blocking(move || keys.reload()).await;
            match reloaded {
                Ok(Ok(KeyReload::Unchanged)) => {}
                Ok(Ok(KeyReload::Changed)) => tracing::info!("ticket and token keys changed"),
                Ok(Err(error)) => {
                    counter!(CLUSTER_KEY_RELOADS_FAILED).increment(1);
                    tracing::warn!(%error, "key files of the cluster changed and cannot be used, keeping the old keys");
                }
                // The runtime is shutting down.
                Err(_) => return,
            }
        }
    }
}

impl ClusterEdge {
    /// Returns the key with which this edge recognises its own connection ids.
    pub(crate) fn connection_id_key(&self) -> ConnectionIdKey {
        match &self.name {
            Some(name) => ConnectionIdKey::derive(&self.keys.reset, name),
            None => ConnectionIdKey::random(),
        }
    }
}

impl fmt::Debug for ClusterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterKeys").field("files", &self.files).finish_non_exhaustive()
    }
}

/// The contents of the files of both rings.
struct Rings {
    tickets: Zeroizing<Vec<u8>>,
    tokens: Zeroizing<Vec<u8>>,
}

impl Rings {
    fn read(files: &ClusterKeyFiles) -> Result<Self, ClusterKeysError> {
        Ok(Self { tickets: read(&files.tickets)?, tokens: read(&files.tokens)? })
    }

    fn tickets(&self, files: &ClusterKeyFiles) -> Result<KeyRing, ClusterKeysError> {
        parse(&self.tickets, &files.tickets)
    }

    fn tokens(&self, files: &ClusterKeyFiles) -> Result<KeyRing, ClusterKeysError> {
        parse(&self.tokens, &files.tokens)
    }

    fn digest(&self) -> [u8; 32] {
        let tickets = Sha256::digest(&self.tickets);
        Sha256::new().chain_update(tickets).chain_update(&self.tokens).finalize().into()
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, ClusterKeysError> {
    let read = fs::read(path)
        .map_err(|source| ClusterKeysError::Read { path: path.to_owned(), source })?;
    Ok(Zeroizing::new(read))
}

fn parse(bytes: &[u8], path: &Path) -> Result<KeyRing, ClusterKeysError> {
    let damaged = || ClusterKeysError::Damaged { path: path.to_owned(), expected: KeyRing::LEN };
    KeyRing::parse(bytes).ok_or_else(damaged)
}
