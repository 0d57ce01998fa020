//! Our own unused key packages: the private halves wait here for the Welcome that uses them.

use std::time::Duration;

use openmls::prelude::{
    Capabilities, Ciphersuite, CredentialType, ExtensionType, KeyPackage, Lifetime, MlsMessageOut,
    OpenMlsProvider as _, Welcome,
};
use qpq_domain::{UnixMillis, Username};

use crate::{
    codec::{Malformed, Reader, Writer},
    identity::Identity,
    profile,
    store::Store,
};

/// The suite of every group: X25519, AES-128-GCM, SHA-256, Ed25519.
pub(crate) const SUITE: Ciphersuite = Ciphersuite::MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519;

/// A package is good for 84 days, and from an hour ago on for those whose clock is behind.
const LIFETIME: Duration = Duration::from_secs(84 * 24 * 3600);
const MARGIN: Duration = Duration::from_secs(3600);

/// How long a private half outlives its package: a Welcome may lie in the inbox for the longest
/// time to live.
const AFTERLIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// What our clients can do, said in every leaf. openmls wants last-resort listed here, or nobody
/// takes such a package.
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
    /// Holds openmls's bundle of the package and its private keys, and nothing else.
    pub(crate) store: Store,
}

#[derive(Default)]
pub(crate) struct Packages(Vec<Package>);

impl Packages {
    /// Makes a package and keeps its private half; returns the public one as an MLSMessage.
    pub(crate) fn make(
        &mut self,
        identity: &Identity,
        username: &Username,
        kind: Use,
        now: UnixMillis,
    ) -> Vec<u8> {
        self.0.retain(|package| package.not_after.plus(AFTERLIFE) > now);
        let store = Store::default();
        let mut builder = KeyPackage::builder()
            .leaf_node_capabilities(capabilities())
            .key_package_lifetime(lifetime(now));
        if kind == Use::LastResort {
            builder = builder.mark_as_last_resort();
        }
        let bundle = builder
            .build(SUITE, &store, identity, identity.credential(username))
            .expect("the suite is supported and the store is memory");
        let package = bundle.key_package().clone();
        let reference = package.hash_ref(store.crypto()).expect("SHA-256 of a package");
        self.0.push(Package {
            reference: reference.as_slice().to_vec(),
            not_after: now.plus(LIFETIME),
            kind,
            store,
        });
        MlsMessageOut::from(package).to_bytes().expect("a package made here is within MLS's limits")
    }

    /// The package of ours that `welcome` was made for.
    pub(crate) fn addressed_by(&self, welcome: &Welcome) -> Option<&Package> {
        welcome.secrets().iter().find_map(|secrets| {
            let reference = secrets.new_member();
            self.0.iter().find(|package| package.reference == reference.as_slice())
        })
    }

    /// Forgets a package that was used, unless it may be used again.
    pub(crate) fn used(&mut self, reference: &[u8]) {
        self.0.retain(|package| package.kind == Use::LastResort || package.reference != reference);
    }

    pub(crate) fn written_len(&self) -> usize {
        8 + self.0.iter().map(|p| 4 + p.reference.len() + 9 + p.store.written_len()).sum::<usize>()
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.count(self.0.len());
        for package in &self.0 {
            writer.bytes(&package.reference);
            writer.number(package.not_after.0);
            writer.raw(&[match package.kind {
                Use::Once => 0,
                Use::LastResort => 1,
            }]);
            package.store.write(writer);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let packages = reader.list(|reader| {
            Ok(Package {
                reference: reader.bytes()?.to_vec(),
                not_after: UnixMillis(reader.number()?),
                kind: match reader.array()? {
                    [0] => Use::Once,
                    [1] => Use::LastResort,
                    _ => return Err(Malformed),
                },
                store: Store::read(reader)?,
            })
        })?;
        Ok(Self(packages))
    }
}

impl Package {
    pub(crate) fn reference(&self) -> &[u8] {
        &self.reference
    }
}
