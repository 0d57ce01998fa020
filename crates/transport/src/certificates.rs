//! The certificate that new connections are shown: the one that its files hold, also after they
//! changed.

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
    Fingerprint, Identity, IdentityError,
    identity::Files,
    metric::{CERT_NOT_AFTER, CERT_RELOADS_FAILED},
};

/// How often to look at the files by default.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(30);

/// From when on an expiring certificate is warned of, and how often.
const EXPIRY_WARNING: i64 = 30 * 24 * 60 * 60;
const EXPIRY_REMINDER: Duration = Duration::from_secs(24 * 60 * 60);

/// A server's identity, exchanged when its files change. Connections that are open keep theirs.
pub struct Certificates {
    cert: PathBuf,
    key: PathBuf,
    current: ArcSwap<Identity>,
    /// Digest of what was last read, good or bad, so that a bad file is complained of once.
    seen: Mutex<[u8; 32]>,
}

/// What a look at the files brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// They are as they were.
    Unchanged,
    /// New connections see another certificate, whose key has this fingerprint.
    Changed(Fingerprint),
}

impl Certificates {
    /// Reads or makes them, as [`Identity::load_or_create`].
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load_or_create(
        cert: &Path,
        key: &Path,
        names: &[String],
    ) -> Result<Arc<Self>, IdentityError> {
        Identity::load_or_create(cert, key, names)?;
        // Once more, so that what is compared later is what is served now.
        Self::load(cert, key)
    }

    /// Reads them, and makes none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(cert: &Path, key: &Path) -> Result<Arc<Self>, IdentityError> {
        let files = Files::read(cert, key)?;
        let identity = Identity::from_files(&files, cert, key)?;
        note_expiry(&identity);
        Ok(Arc::new(Self {
            cert: cert.to_owned(),
            key: key.to_owned(),
            current: ArcSwap::from_pointee(identity),
            seen: Mutex::new(files.digest()),
        }))
    }

    /// What new connections are shown.
    #[must_use]
    pub fn identity(&self) -> Arc<Identity> {
        self.current.load_full()
    }

    /// The fingerprint of the key that new connections are shown.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.current.load().fingerprint()
    }

    /// Looks at the files and takes what they hold, if that is new and certificate and key belong
    /// together.
    ///
    /// # Errors
    /// [`IdentityError`]; the old identity stays. The same bad content is an error once, then
    /// `Unchanged`.
    pub fn reload(&self) -> Result<Reload, IdentityError> {
        let files = Files::read(&self.cert, &self.key)?;
        let mut seen = self.seen.lock();
        if std::mem::replace(&mut *seen, files.digest()) == files.digest() {
            return Ok(Reload::Unchanged);
        }
        let identity = Identity::from_files(&files, &self.cert, &self.key)?;
        let fingerprint = identity.fingerprint();
        note_expiry(&identity);
        self.current.store(Arc::new(identity));
        Ok(Reload::Changed(fingerprint))
    }

    /// Looks at the files again and again, by content, since Kubernetes swaps them under unchanged
    /// names; for a background task. Failures are logged and counted.
    pub async fn watch(self: Arc<Self>, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reminded = Instant::now();
        loop {
            ticks.tick().await;
            let certificates = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || certificates.reload()).await;
            match looked {
                Ok(Ok(Reload::Unchanged)) => {}
                Ok(Ok(Reload::Changed(fingerprint))) => {
                    tracing::info!(%fingerprint, "the certificate was changed");
                    reminded = Instant::now();
                }
                Ok(Err(error)) => {
                    counter!(CERT_RELOADS_FAILED).increment(1);
                    tracing::warn!(%error, "the certificate files changed and cannot be used: the old ones stay");
                }
                // The runtime is going down.
                Err(_) => return,
            }
            if reminded.elapsed() >= EXPIRY_REMINDER {
                note_expiry(&self.current.load());
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

/// Measures the end of validity and warns when it is near.
fn note_expiry(identity: &Identity) {
    let Some(not_after) = identity.not_after() else { return };
    gauge!(CERT_NOT_AFTER).set(not_after as f64);
    // The clock that certificates are verified by.
    let Some(now) = DefaultTimeProvider.current_time() else { return };
    let left = not_after - i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if left < 0 {
        tracing::warn!(
            "the certificate has expired: clients that check it refuse to connect; renew it"
        );
    } else if left < EXPIRY_WARNING {
        tracing::warn!(days = left / (24 * 60 * 60), "the certificate expires soon: renew it");
    }
}
