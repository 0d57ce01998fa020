//! The device that keeps the bundle up to date.

use std::time::Duration;

use prost::Message as _;
use qpq_domain::UnixMillis;
use qpq_mls::database::DatabaseError;
use qpq_proto::{methods, v1};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::bundle::{self, BundleKeys, SlotKey, export_slot};
use crate::{
    error::Error,
    messenger::{Messenger, now, records::Corrupt, state::State, tables::SETTINGS},
    secret::ExportKey,
};

const KEPT: &[u8] = b"recovery";

/// The minimum time between two bundles.
const INTERVAL: Duration = Duration::from_secs(60);

/// Whether this device keeps the account's recovery bundle up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryStatus {
    /// The version of the last bundle that this device has stored.
    pub version: u64,
    /// The time at which it was stored.
    pub stored_at: UnixMillis,
    /// Whether conversations or people have changed since.
    pub is_outdated: bool,
}

/// The state of the device that keeps the bundle, as saved.
#[derive(Clone, PartialEq, prost::Message)]
struct Kept {
    #[prost(bytes = "vec", tag = "1")]
    export_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    code_key: Vec<u8>,
    /// The version of the last stored bundle.
    #[prost(uint64, tag = "3")]
    version: u64,
    #[prost(uint64, tag = "4")]
    stored_at: u64,
    /// The SHA-256 of the content of the last bundle; empty if the next one is due in any case.
    #[prost(bytes = "vec", tag = "5")]
    digest: Vec<u8>,
    /// A sealed bundle that the server may or may not have stored as the next version.
    #[prost(bytes = "vec", tag = "6")]
    pending: Vec<u8>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.export_key);
        zeroize::Zeroize::zeroize(&mut self.code_key);
    }
}

impl Kept {
    fn new(keys: &BundleKeys, version: u64) -> Self {
        Self {
            export_key: keys.export.to_vec(),
            code_key: keys.code.to_vec(),
            version,
            stored_at: 0,
            digest: Vec::new(),
            pending: Vec::new(),
        }
    }

    fn keys(&self) -> Result<BundleKeys, Corrupt> {
        let key = |bytes: &[u8]| bytes.try_into().map(Zeroizing::new).map_err(Corrupt::new);
        Ok(BundleKeys { export: key(&self.export_key)?, code: key(&self.code_key)? })
    }
}

impl Messenger {
    /// Returns the state of the bundle as far as this device knows; `None` if this device does not
    /// keep it. Makes no call to the server.
    pub async fn recovery_status(&self) -> Result<Option<RecoveryStatus>, Error> {
        self.store()
            .read(|state| {
                let Some(kept) = state.kept()? else { return Ok(None) };
                let content = state.recovery_content(&kept.keys().map_err(DatabaseError::from)?)?;
                Ok(Some(RecoveryStatus {
                    version: kept.version,
                    stored_at: UnixMillis(kept.stored_at),
                    is_outdated: kept.digest != digest(&content) || !kept.pending.is_empty(),
                }))
            })
            .await
    }

    /// Stores a first bundle, whatever the server has, and keeps it up to date from then on.
    pub(super) async fn begin_keeping(&self, keys: BundleKeys) -> Result<(), Error> {
        let (content_keys, identity) = (keys.clone(), self.profile().identity);
        let content = self.store().read(move |state| state.recovery_content(&content_keys)).await?;
        let sealed = bundle::seal(&identity, &keys, &content);
        let version = self.store_bundle(sealed, 0).await?;
        let digest = digest(&content);
        let mut kept = Kept::new(&keys, version);
        (kept.digest, kept.stored_at) = (digest, now().0);
        self.store().change(move |state| Ok(state.set_kept(Some(&kept))?)).await
    }

    pub(super) async fn stop_keeping(&self) -> Result<(), Error> {
        self.store().change(|state| Ok(state.set_kept(None)?)).await
    }

    /// Stores a new bundle if this device keeps it, the account has changed, and the last one is
    /// old enough.
    pub(in crate::messenger) async fn update_recovery(&self) -> Result<(), Error> {
        if !self.store().read(|state| Ok(state.kept()?.is_some())).await? {
            return Ok(());
        }
        // The second bundle is due if the password has changed while the first one was pending.
        for _ in 0..2 {
            let identity = self.profile().identity;
            let due = self.store().change(move |state| state.next_bundle(&identity, now())).await?;
            let Some((sealed, replaces)) = due else { return Ok(()) };
            let stored = self.store_bundle(sealed.clone(), replaces).await;
            match stored {
                Ok(version) => {
                    self.store().change(move |state| state.end_bundle(&sealed, version)).await?;
                }
                Err(Error::Call(error)) if error.is_code("recovery.stale_version") => {
                    tracing::info!("another device keeps the recovery bundle now, or removed it");
                    return self.store().change(move |state| state.give_up(replaces)).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn store_bundle(&self, sealed: Vec<u8>, replaces: u64) -> Result<u64, Error> {
        let request = v1::StoreRecoveryBundleRequest {
            bundle: sealed.into(),
            expected_version: replaces,
            ..Default::default()
        };
        Ok(self.client().call::<methods::StoreRecoveryBundle>(request).await?.version)
    }
}

impl State {
    fn kept(&self) -> Result<Option<Kept>, DatabaseError> {
        let row = self.database().get(SETTINGS, KEPT)?;
        row.map(|row| Ok(Kept::decode(&row[..]).map_err(Corrupt::new)?)).transpose()
    }

    fn set_kept(&self, kept: Option<&Kept>) -> Result<(), DatabaseError> {
        match kept {
            Some(kept) => {
                let row = Zeroizing::new(kept.encode_to_vec());
                self.database().put(SETTINGS, KEPT, None, &row)
            }
            None => self.database().delete(SETTINGS, KEPT).map(drop),
        }
    }

    fn recovery_content(&self, keys: &BundleKeys) -> Result<Zeroizing<Vec<u8>>, Error> {
        Ok(bundle::encode(self.account_content()?, &keys.code))
    }

    /// Returns the bundle to store next and the version that it replaces, if one is due. The bundle
    /// is saved as pending.
    fn next_bundle(
        &self,
        identity: &qpq_domain::IdentityKey,
        now: UnixMillis,
    ) -> Result<Option<(Vec<u8>, u64)>, Error> {
        let Some(mut kept) = self.kept()? else { return Ok(None) };
        if !kept.pending.is_empty() {
            return Ok(Some((kept.pending.clone(), kept.version)));
        }
        let last = UnixMillis(kept.stored_at);
        let is_recent = now.since(last) < INTERVAL && last <= now;
        if is_recent && !kept.digest.is_empty() {
            return Ok(None);
        }
        let keys = kept.keys().map_err(DatabaseError::from)?;
        let content = self.recovery_content(&keys)?;
        let digest = digest(&content);
        if kept.digest == digest {
            return Ok(None);
        }
        kept.digest = digest;
        kept.stored_at = now.0;
        kept.pending = bundle::seal(identity, &keys, &content);
        self.set_kept(Some(&kept))?;
        Ok(Some((kept.pending.clone(), kept.version)))
    }

    /// Notes that a pending bundle is stored.
    fn end_bundle(&self, sealed: &[u8], version: u64) -> Result<(), Error> {
        if let Some(mut kept) = self.kept()?
            && kept.pending == sealed
        {
            kept.version = version;
            kept.pending = Vec::new();
            self.set_kept(Some(&kept))?;
        }
        Ok(())
    }

    /// Stops keeping the bundle, unless another process has stored one meanwhile.
    fn give_up(&self, replaces: u64) -> Result<(), Error> {
        if self.kept()?.is_some_and(|kept| kept.version == replaces) {
            self.set_kept(None)?;
        }
        Ok(())
    }

    /// Keeps the bundle up to date from now on, as a device that was restored from it.
    pub(super) fn continue_keeping(
        &self,
        export: SlotKey,
        code: SlotKey,
        version: u64,
    ) -> Result<(), DatabaseError> {
        self.set_kept(Some(&Kept::new(&BundleKeys { export, code }, version)))
    }

    /// Notes the export key of a login. If it is another one than before, the next bundle is sealed
    /// under it, and is due.
    pub(in crate::messenger) fn note_export_key(
        &self,
        export_key: &ExportKey,
    ) -> Result<(), DatabaseError> {
        let Some(mut kept) = self.kept()? else { return Ok(()) };
        let slot = export_slot(&self.me(), export_key);
        if kept.export_key != slot[..] {
            kept.export_key = slot.to_vec();
            kept.digest = Vec::new();
            self.set_kept(Some(&kept))?;
        }
        Ok(())
    }
}

fn digest(content: &[u8]) -> Vec<u8> {
    Sha256::digest(content).to_vec()
}
