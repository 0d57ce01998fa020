//! openmls's key-value storage: one for each group and each unused KeyPackage. Dropping the storage
//! undoes a failed Welcome.
//!
//! A store is loaded from the database as a whole; saving writes only the values that changed.
//! openmls accesses only memory, so its errors are never those of storage.

use std::collections::HashMap;

use openmls::prelude::OpenMlsProvider;
use openmls_rust_crypto::{MemoryStorage, OpenMlsRustCrypto, RustCrypto};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroize as _;

use crate::{
    codec::{Malformed, Reader, Writer},
    database::{Database, DatabaseError},
    tables,
};

const UNPOISONED: &str = "no code panics while it holds the map";

/// A provider of cryptography and storage to openmls. Its contents are overwritten on drop.
#[derive(Default)]
pub(crate) struct Store {
    memory: OpenMlsRustCrypto,
    /// The content of the database: a digest of the value of each key.
    saved: HashMap<Vec<u8>, [u8; 32]>,
}

impl Store {
    /// Returns a second store with the same content, all of it unsaved.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::default();
        *copy.memory.storage().values.write().expect(UNPOISONED) =
            self.memory.storage().values.read().expect(UNPOISONED).clone();
        copy
    }

    /// Loads the values of `owner`.
    pub(crate) fn load(database: &Database, owner: &[u8]) -> Result<Self, DatabaseError> {
        let mut store = Self::default();
        let mut values = store.memory.storage().values.write().expect(UNPOISONED);
        for row in database.in_lane(tables::MLS, owner)? {
            let mut reader = Reader::new(&row);
            let (key, value) = read_entry(&mut reader).map_err(|Malformed| damaged())?;
            store.saved.insert(key.clone(), Sha256::digest(&value).into());
            values.insert(key, value);
        }
        drop(values);
        Ok(store)
    }

    /// Saves the values that have changed since they were loaded or saved.
    pub(crate) fn save(&mut self, database: &Database, owner: &[u8]) -> Result<(), DatabaseError> {
        let values = self.memory.storage().values.read().expect(UNPOISONED);
        for (key, value) in values.iter() {
            let digest: [u8; 32] = Sha256::digest(value).into();
            if self.saved.get(key) == Some(&digest) {
                continue;
            }
            let mut writer = Writer::with_capacity(8 + key.len() + value.len());
            writer.bytes(key);
            writer.bytes(value);
            database.put(tables::MLS, &row_key(owner, key), Some(owner), writer.written())?;
            self.saved.insert(key.clone(), digest);
        }
        let gone: Vec<_> =
            self.saved.keys().filter(|key| !values.contains_key(*key)).cloned().collect();
        for key in gone {
            database.delete(tables::MLS, &row_key(owner, &key))?;
            self.saved.remove(&key);
        }
        Ok(())
    }

    /// Returns the number of bytes that [`Store::write`] writes.
    pub(crate) fn written_len(&self) -> usize {
        let values = self.memory.storage().values.read().expect(UNPOISONED);
        values.iter().map(|(key, value)| 8 + key.len() + value.len()).sum::<usize>() + 8
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        let values = self.memory.storage().values.read().expect(UNPOISONED);
        writer.count(values.len());
        for (key, value) in values.iter() {
            writer.bytes(key);
            writer.bytes(value);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let entries = reader.list(read_entry)?;
        let store = Self::default();
        store.memory.storage().values.write().expect(UNPOISONED).extend(entries);
        Ok(store)
    }
}

fn read_entry(reader: &mut Reader<'_>) -> Result<(Vec<u8>, Vec<u8>), Malformed> {
    Ok((reader.bytes()?.to_vec(), reader.bytes()?.to_vec()))
}

/// Returns the key of a row. No owner is a prefix of another, so keys of different owners differ.
fn row_key(owner: &[u8], key: &[u8]) -> Vec<u8> {
    [owner, key].concat()
}

fn damaged() -> DatabaseError {
    DatabaseError::Damaged("a value of a group is cut short".into())
}

impl Drop for Store {
    fn drop(&mut self) {
        let mut values = self.memory.storage().values.write().expect(UNPOISONED);
        values.values_mut().for_each(|value| value.zeroize());
    }
}

impl OpenMlsProvider for Store {
    type CryptoProvider = RustCrypto;
    type RandProvider = RustCrypto;
    type StorageProvider = MemoryStorage;

    fn storage(&self) -> &MemoryStorage {
        self.memory.storage()
    }

    fn crypto(&self) -> &RustCrypto {
        self.memory.crypto()
    }

    fn rand(&self) -> &RustCrypto {
        self.memory.rand()
    }
}
