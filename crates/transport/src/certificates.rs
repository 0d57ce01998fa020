//! The server's certificate, reloaded when its files change.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use metrics::{counter, gauge};
use parking_lot::Mutex;
use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    time_provider::{DefaultTimeProvider, TimeProvider},
};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{
    fingerprint::Fingerprint,
    identity::{Files, Identity, IdentityError},
    metric::{CERT_NOT_AFTER, CERT_RELOADS_FAILED},
};

/// The default interval of [`Certificates::watch`].
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(30);

/// The time before the end of validity from which warnings are logged, in seconds.
const EXPIRY_WARNING: i64 = 30 * 24 * 60 * 60;
/// The time between two warnings.
const EXPIRY_REMINDER: Duration = Duration::from_secs(24 * 60 * 60);

/// A server's identity, replaced when its files change. Open connections keep the identity that
/// they were created with.
pub struct Certificates {
    cert: PathBuf,
    key: PathBuf,
    current: ArcSwap<Identity>,
    /// The digest of the contents that were read last, usable or not. An unusable file is thus
    /// reported once.
    last_read: Mutex<[u8; 32]>,
}

/// The outcome of [`Certificates::reload`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// The files have not changed.
    Unchanged,
    /// New connections receive another certificate, whose key has this fingerprint.
    Changed(Fingerprint),
}

impl Certificates {
    /// Reads or creates the files as [`Identity::load_or_create`] does.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load_or_create(
        cert: &Path,
        key: &Path,
        names: &[String],
    ) -> Result<Arc<Self>, IdentityError> {
        Identity::load_or_create(cert, key, names)?;
        // Read again, so that later reloads compare with the contents that are served now.
        Self::load(cert, key)
    }

    /// Reads the files.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(cert: &Path, key: &Path) -> Result<Arc<Self>, IdentityError> {
        let files = Files::read(cert, key)?;
        let identity = Identity::from_files(&files, cert, key)?;
        record_expiry(&identity);
        Ok(Arc::new(Self {
            cert: cert.to_owned(),
            key: key.to_owned(),
            current: ArcSwap::from_pointee(identity),
            last_read: Mutex::new(files.digest()),
        }))
    }

    /// Returns the identity for new connections.
    #[must_use]
    pub fn identity(&self) -> Arc<Identity> {
        self.current.load_full()
    }

    /// Returns the fingerprint of the key for new connections.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.current.load().fingerprint()
    }

    /// Reads the files, and replaces the identity if they have changed.
    ///
    /// # Errors
    /// [`IdentityError`]. The old identity stays. The same unusable contents are an error the first
    /// time, and `Unchanged` after that.
    pub fn reload(&self) -> Result<Reload, IdentityError> {
        let files = Files::read(&self.cert, &self.key)?;
        let mut last_read = self.last_read.lock();
        if std::mem::replace(&mut *last_read, files.digest()) == files.digest() {
            return Ok(Reload::Unchanged);
        }
        let identity = Identity::from_files(&files, &self.cert, &self.key)?;
        let fingerprint = identity.fingerprint();
        record_expiry(&identity);
        self.current.store(Arc::new(identity));
        Ok(Reload::Changed(fingerprint))
    }

    /// Reloads the files at every interval, forever. Failures are logged and counted.
    ///
    /// Compares contents, because Kubernetes replaces files under unchanged names. The caller runs
    /// it as a task.
    pub async fn watch(self: Arc<Self>, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reminded = Instant::now();
        loop {
            ticks.tick().await;
            let certificates = Arc::clone(&self);
            let reloaded = tokio::task::spawn_blocking(move || certificates.reload()).await;
            match reloaded {
                Ok(Ok(Reload::Unchanged)) => {}
                Ok(Ok(Reload::Changed(fingerprint))) => {
                    tracing::info!(%fingerprint, "certificate changed");
                    reminded = Instant::now();
                }
                Ok(Err(error)) => {
                    counter!(CERT_RELOADS_FAILED).increment(1);
                    tracing::warn!(%error, "certificate files changed and cannot be used, keeping the old certificate");
                }
                // The runtime is shutting down.
                Err(_) => return,
            }
            if reminded.elapsed() >= EXPIRY_REMINDER {
                record_expiry(&self.current.load());
                reminded = Instant::now();
            }
        }
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(self.current.load().certified()))
    }
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates")
            .field("current", &self.current.load())
            .finish_non_exhaustive()
    }
}

/// Records the end of validity, and warns if it is near.
fn record_expiry(identity: &Identity) {
    let Some(not_after) = identity.not_after() else { return };
    gauge!(CERT_NOT_AFTER).set(not_after as f64);
    // The clock with which rustls verifies certificates.
    let Some(now) = DefaultTimeProvider.current_time() else { return };
    let left = not_after - i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if left < 0 {
        tracing::warn!(
            "certificate has expired, clients that verify it refuse to connect: renew it"
        );
    } else if left < EXPIRY_WARNING {
        tracing::warn!(days = left / (24 * 60 * 60), "certificate expires soon: renew it");
    }
}
