//! What all edges of a fleet share below the calls, so that a client may be taken from one to
//! another: the keys of session tickets, of the tokens that prove an address, and of stateless
//! resets.
//!
//! Ticket and token keys are [`KeyRing`]s and are exchanged while the server runs, when their files
//! change. The reset key is not: the reset tokens of every open connection were made with it and
//! sent, and a reset under another key would be taken for noise. It is replaced by restarting the
//! edges, one after the other.

mod connection_ids;
mod ring;
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

use crate::metric::FLEET_KEY_RELOADS_FAILED;

pub(crate) use connection_ids::{Recognised, generator};
pub use ring::KeyRing;
pub(crate) use tickets::Tickets;
pub(crate) use tokens::Tokens;

/// Length of the reset key, in bytes.
pub const RESET_KEY_LEN: usize = 32;

/// Where the keys are.
#[derive(Debug, Clone)]
pub struct FleetFiles {
    /// The [`KeyRing`] of session tickets. As precious as the certificate's key: whoever has it can
    /// stand in for the server towards clients that resume, and tickets are readable on the wire.
    pub tickets: PathBuf,
    /// The [`KeyRing`] of the tokens by which a client proves its address (Retry).
    pub tokens: PathBuf,
    /// The key of stateless resets.
    pub reset: PathBuf,
}

/// The keys of a fleet, exchanged when their files change.
pub struct FleetKeys {
    files: FleetFiles,
    pub(crate) tickets: Arc<Tickets>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) reset: hmac::Key,
    /// Digest of the rings that were last read, good or bad, so that bad ones are complained of
    /// once.
    seen: Mutex<[u8; 32]>,
}

/// A server's place in a fleet.
#[derive(Debug, Clone)]
pub struct Member {
    /// What it shares with the others.
    pub keys: Arc<FleetKeys>,
    /// A name that no other running edge has. An edge that is started again under its name tells
    /// the clients of its predecessor at their next packet that their connections are gone; without
    /// a name they learn it by silence.
    pub edge: Option<String>,
}

/// Why the keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FleetKeysError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} is damaged: it does not hold {expected} bytes of key")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its right length.
        expected: usize,
    },
}

/// What a look at the files brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyReload {
    /// They are as they were.
    Unchanged,
    /// New tickets and tokens are made with other keys.
    Changed,
}

impl FleetKeys {
    /// Reads them.
    ///
    /// # Errors
    /// [`FleetKeysError`].
    pub fn load(files: FleetFiles) -> Result<Arc<Self>, FleetKeysError> {
        let rings = Rings::read(&files)?;
        let reset = read(&files.reset)?;
        if reset.len() != RESET_KEY_LEN || ring::is_blank(&reset) {
            return Err(FleetKeysError::Damaged { path: files.reset, expected: RESET_KEY_LEN });
        }
        Ok(Arc::new(Self {
            tickets: Arc::new(Tickets::new(&rings.tickets(&files)?)),
            tokens: Arc::new(Tokens::new(&rings.tokens(&files)?)),
            reset: hmac::Key::new(hmac::HMAC_SHA256, &reset),
            seen: Mutex::new(rings.digest()),
            files,
        }))
    }

    /// Looks at the files of the rings and takes what they hold, if that is new and whole.
    ///
    /// # Errors
    /// [`FleetKeysError`]; the old keys stay. The same bad content is an error once, then
    /// `Unchanged`.
    pub fn reload(&self) -> Result<KeyReload, FleetKeysError> {
        let rings = Rings::read(&self.files)?;
        let mut seen = self.seen.lock();
        if std::mem::replace(&mut *seen, rings.digest()) == rings.digest() {
            return Ok(KeyReload::Unchanged);
        }
        let (tickets, tokens) = (rings.tickets(&self.files)?, rings.tokens(&self.files)?);
        self.tickets.exchange(&tickets);
        self.tokens.exchange(&tokens);
        Ok(KeyReload::Changed)
    }

    /// Looks at the files again and again, by content, as
    /// [`Certificates::watch`](crate::Certificates::watch) does.
    pub async fn watch(self: Arc<Self>, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let keys = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || keys.reload()).await;
            match looked {
                Ok(Ok(KeyReload::Unchanged)) => {}
                Ok(Ok(KeyReload::Changed)) => tracing::info!("ticket and token keys were changed"),
                Ok(Err(error)) => {
                    counter!(FLEET_KEY_RELOADS_FAILED).increment(1);
                    tracing::warn!(%error, "the fleet's key files changed and cannot be used: the old keys stay");
                }
                // The runtime is going down.
                Err(_) => return,
            }
        }
    }
}

impl Member {
    /// How this edge recognises its own connection ids.
    pub(crate) fn recognised(&self) -> Recognised {
        match &self.edge {
            Some(edge) => Recognised::by_name(&self.keys.reset, edge),
            None => Recognised::while_running(),
        }
    }
}

impl fmt::Debug for FleetKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetKeys").field("files", &self.files).finish_non_exhaustive()
    }
}

/// The bytes of both rings.
struct Rings {
    tickets: Zeroizing<Vec<u8>>,
    tokens: Zeroizing<Vec<u8>>,
}

impl Rings {
    fn read(files: &FleetFiles) -> Result<Self, FleetKeysError> {
        Ok(Self { tickets: read(&files.tickets)?, tokens: read(&files.tokens)? })
    }

    fn tickets(&self, files: &FleetFiles) -> Result<KeyRing, FleetKeysError> {
        parse(&self.tickets, &files.tickets)
    }

    fn tokens(&self, files: &FleetFiles) -> Result<KeyRing, FleetKeysError> {
        parse(&self.tokens, &files.tokens)
    }

    fn digest(&self) -> [u8; 32] {
        let tickets = Sha256::digest(&self.tickets);
        Sha256::new().chain_update(tickets).chain_update(&self.tokens).finalize().into()
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, FleetKeysError> {
    let read =
        fs::read(path).map_err(|source| FleetKeysError::Read { path: path.to_owned(), source })?;
    Ok(Zeroizing::new(read))
}

fn parse(bytes: &[u8], path: &Path) -> Result<KeyRing, FleetKeysError> {
    let damaged = || FleetKeysError::Damaged { path: path.to_owned(), expected: KeyRing::LEN };
    KeyRing::parse(bytes).ok_or_else(damaged)
}
