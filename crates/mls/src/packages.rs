//! Our own unused KeyPackages. The private halves are kept for the Welcome that uses them.

use std::time::Duration;

use openmls::prelude::{
    Capabilities, Ciphersuite, CredentialType, ExtensionType, KeyPackage, Lifetime, MlsMessageOut,
    OpenMlsProvider as _, Welcome,
};
use qpq_domain::UnixMillis;

use crate::{
    codec::{Malformed, Reader, Writer},
    database::{Database, DatabaseError},
    leaf::LeafSigner,
    profile,
    store::Store,
    tables,
};

/// The suite of every group: X25519, AES-128-GCM, SHA-256, Ed25519.
pub(crate) const SUITE: Ciphersuite = Ciphersuite::MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519;

/// The lifetime of a package. The lifetime begins `MARGIN` before the creation, for clients whose
/// clock is behind.
const LIFETIME: Duration = Duration::from_secs(84 * 24 * 3600);
const MARGIN: Duration = Duration::from_secs(3600);

/// The time for which a private half is kept after the end of its package.
///
/// A Welcome stays in an inbox for at most this time.
const AFTERLIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// Returns the capabilities in every leaf of our clients.
///
/// Without last_resort in them, openmls refuses last-resort packages.
pub(crate) fn capabilities() -> Capabilities {
    Capabilities::new(
        None,
        Some(&[SUITE]),
        Some(&[ExtensionType::LastResort, ExtensionType::Unknown(profile::EXTENSION)]),
        None,
        Some(&[CredentialType::Basic]),
    )
}

pub(crate) fn lifetime(now: UnixMillis) -> Lifetime {
    Lifetime::init(now.minus(MARGIN).0 / 1000, now.plus(LIFETIME).0 / 1000)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Once,
    LastResort,
}

pub(crate) struct Package {
    reference: Vec<u8>,
    not_after: UnixMillis,
    kind: Use,
    /// Contains openmls's bundle of the package and its private keys, and nothing else.
    pub(crate) store: Store,
}

/// Creates a package and saves its private half. Returns the public half as an MLSMessage.
pub(crate) fn create(
    database: &Database,
    leaf: &LeafSigner,
    kind: Use,
    now: UnixMillis,
) -> Result<Vec<u8>, DatabaseError> {
    let store = Store::default();
    let mut builder = KeyPackage::builder()
        .leaf_node_capabilities(capabilities())
        .key_package_lifetime(lifetime(now));
    if kind == Use::LastResort {
        builder = builder.mark_as_last_resort();
    }
    let bundle = builder
        .build(SUITE, &store, leaf, leaf.credential())
        .expect("the suite is supported and the store is memory");
    let package = bundle.key_package().clone();
    let reference = package.hash_ref(store.crypto()).expect("SHA-256 of a package");
    let reference = reference.as_slice().to_vec();
    Package { reference, not_after: now.plus(LIFETIME), kind, store }.save(database)?;
    Ok(MlsMessageOut::from(package)
        .to_bytes()
        .expect("a package created here is within MLS's limits"))
}

/// Returns the package of ours that `welcome` was created for.
pub(crate) fn addressed_by(
    database: &Database,
    welcome: &Welcome,
) -> Result<Option<Package>, DatabaseError> {
    for secrets in welcome.secrets() {
        if let Some(row) = database.get(tables::PACKAGES, secrets.new_member().as_slice())? {
            return Package::parse(&row).map(Some);
        }
    }
    Ok(None)
}

/// Removes a used package, unless it is a last-resort package.
///
/// If the account has other devices, the reference of the package is kept. A Welcome for a package
/// that is neither here nor among the used ones is for another device.
pub(crate) fn used(
    database: &Database,
    package: &Package,
    has_other_devices: bool,
) -> Result<(), DatabaseError> {
    if package.kind == Use::LastResort {
        return Ok(());
    }
    database.delete(tables::PACKAGES, &package.reference)?;
    if has_other_devices {
        let mut row = Writer::with_capacity(4 + package.reference.len() + 8);
        row.bytes(&package.reference);
        row.number(package.not_after.0);
        database.put(tables::USED, &package.reference, None, row.written())?;
    }
    Ok(())
}

/// Returns whether `welcome` was created for a package of ours that was used before.
pub(crate) fn was_used(database: &Database, welcome: &Welcome) -> Result<bool, DatabaseError> {
    for secrets in welcome.secrets() {
        if database.get(tables::USED, secrets.new_member().as_slice())?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes the packages that Welcomes can no longer need.
pub(crate) fn remove_expired(database: &Database, now: UnixMillis) -> Result<(), DatabaseError> {
    for row in database.all(tables::PACKAGES)? {
        let package = Package::parse(&row)?;
        if package.not_after.plus(AFTERLIFE) <= now {
            database.delete(tables::PACKAGES, &package.reference)?;
        }
    }
    for row in database.all(tables::USED)? {
        let mut reader = Reader::new(&row);
        let parsed = reader.bytes().and_then(|reference| Ok((reference, reader.number()?)));
        let (reference, not_after) = parsed.map_err(|Malformed| damaged())?;
        if UnixMillis(not_after).plus(AFTERLIFE) <= now {
            database.delete(tables::USED, reference)?;
        }
    }
    Ok(())
}

fn damaged() -> DatabaseError {
    DatabaseError::Damaged("a key package is cut short".into())
}

impl Package {
    pub(crate) fn save(&self, database: &Database) -> Result<(), DatabaseError> {
        database.put(tables::PACKAGES, &self.reference, None, self.encode().written())
    }

    pub(crate) fn encode(&self) -> Writer {
        let len = 4 + self.reference.len() + 9 + self.store.written_len();
        let mut writer = Writer::with_capacity(len);
        writer.bytes(&self.reference);
        writer.number(self.not_after.0);
        writer.raw(&[match self.kind {
            Use::Once => 0,
            Use::LastResort => 1,
        }]);
        self.store.write(&mut writer);
        writer
    }

    fn parse(row: &[u8]) -> Result<Self, DatabaseError> {
        Self::read(&mut Reader::new(row)).map_err(|Malformed| damaged())
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            reference: reader.bytes()?.to_vec(),
            not_after: UnixMillis(reader.number()?),
            kind: match reader.array()? {
                [0] => Use::Once,
                [1] => Use::LastResort,
                _ => return Err(Malformed),
            },
            store: Store::read(reader)?,
        })
    }
}
