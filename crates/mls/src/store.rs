//! openmls's key-value storage, one for each group and each unused key package, so that a failed
//! Welcome is undone by dropping what it touched and a snapshot is a plain copy.

use openmls::prelude::OpenMlsProvider;
use openmls_rust_crypto::{MemoryStorage, OpenMlsRustCrypto, RustCrypto};
use zeroize::Zeroize as _;

use crate::codec::{Malformed, Reader, Writer};

const UNPOISONED: &str = "no code panics while it holds the map";

/// A provider of cryptography and storage to openmls. What it holds is overwritten when it is
/// dropped.
#[derive(Default)]
pub(crate) struct Store(OpenMlsRustCrypto);

impl Store {
    /// A second store with the same content.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::default();
        *copy.0.storage().values.write().expect(UNPOISONED) =
            self.0.storage().values.read().expect(UNPOISONED).clone();
        copy
    }

    /// How many bytes [`Store::write`] writes.
    pub(crate) fn written_len(&self) -> usize {
        let values = self.0.storage().values.read().expect(UNPOISONED);
        values.iter().map(|(key, value)| 8 + key.len() + value.len()).sum::<usize>() + 8
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        let values = self.0.storage().values.read().expect(UNPOISONED);
        let mut entries: Vec<_> = values.iter().collect();
        entries.sort_unstable();
        writer.count(entries.len());
        for (key, value) in entries {
            writer.bytes(key);
            writer.bytes(value);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let entries =
            reader.list(|reader| Ok((reader.bytes()?.to_vec(), reader.bytes()?.to_vec())))?;
        let store = Self::default();
        store.0.storage().values.write().expect(UNPOISONED).extend(entries);
        Ok(store)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let mut values = self.0.storage().values.write().expect(UNPOISONED);
        values.values_mut().for_each(|value| value.zeroize());
    }
}

impl OpenMlsProvider for Store {
    type CryptoProvider = RustCrypto;
    type RandProvider = RustCrypto;
    type StorageProvider = MemoryStorage;

    fn storage(&self) -> &MemoryStorage {
        self.0.storage()
    }

    fn crypto(&self) -> &RustCrypto {
        self.0.crypto()
    }

    fn rand(&self) -> &RustCrypto {
        self.0.rand()
    }
}
