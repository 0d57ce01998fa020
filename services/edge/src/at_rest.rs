//! The keys at rest of this server, and the check that they can open everything that is sealed.
//!
//! A single node creates the file at its first start, also in a data directory of a release that
//! did not have the file: nothing is sealed there. Once something is sealed, a missing file or key
//! is an error. An edge of a cluster creates no file.

use std::path::{Path, PathBuf};

use qpq_ports::{AtRestKeyId, RecoveryBundles, StoreError};
use qpq_rpc::{AtRestKeys, at_rest::InvalidAtRestKeys};
use qpq_runtime::data_dir::{
    DataDir, DataDirError,
    cluster::{AT_REST_KEYS, AT_REST_KEYS_IF_LOST, ClusterDir, ClusterDirError},
};
use rand::rngs::OsRng;

/// The reason why the keys at rest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AtRestError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Cluster(#[from] ClusterDirError),
    #[error(
        "{path} is missing although the database contains recovery bundles that need it. Restore \
         it from a backup. {AT_REST_KEYS_IF_LOST}"
    )]
    Lost { path: PathBuf },
    #[error(
        "{path} is missing. Copy it from another edge or a backup. If the cluster was created by a \
         release without this file, create it once with `qpq-admin add-at-rest-keys --dir {dir}`, \
         and copy it to every edge"
    )]
    MissingInCluster { path: PathBuf, dir: PathBuf },
    #[error(
        "{path} is damaged: {source}. Restore it from a backup, or copy it from another edge. \
         {AT_REST_KEYS_IF_LOST}"
    )]
    Damaged { path: PathBuf, source: InvalidAtRestKeys },
    #[error(
        "{path} does not contain the key {key}, which recovery bundles in the database need. \
         Restore the file from a backup, or copy it from another edge. {AT_REST_KEYS_IF_LOST}"
    )]
    KeyMissing { path: PathBuf, key: AtRestKeyId },
    #[error("the keys of recovery bundles cannot be read from the database: {0}")]
    Store(#[from] StoreError),
}

/// Reads the keys of a single node, or creates them if nothing is sealed yet.
pub(crate) async fn load_or_create(
    dir: &DataDir,
    bundles: &dyn RecoveryBundles,
) -> Result<AtRestKeys, AtRestError> {
    let path = dir.path().join(AT_REST_KEYS);
    let file = match dir.read_any(AT_REST_KEYS)? {
        Some(file) => file,
        None if bundles.next_key(None).await?.is_some() => {
            return Err(AtRestError::Lost { path });
        }
        None => {
            dir.add(AT_REST_KEYS, &AtRestKeys::generate(&mut OsRng))?;
            let created = dir.read_any(AT_REST_KEYS)?;
            created.ok_or_else(|| DataDirError::Missing { path: path.clone() })?
        }
    };
    check(parse(path.clone(), &file)?, path, bundles).await
}

/// Reads the keys from the directory that all edges share.
pub(crate) fn load_shared(dir: &Path) -> Result<AtRestKeys, AtRestError> {
    let dir = ClusterDir::open(dir)?;
    let path = dir.file(AT_REST_KEYS);
    let missing =
        || AtRestError::MissingInCluster { path: path.clone(), dir: dir.path().to_owned() };
    let file = dir.read_any(AT_REST_KEYS)?.ok_or_else(missing)?;
    parse(path, &file)
}

/// Checks the keys of the directory that all edges share.
pub(crate) async fn check_shared(
    keys: AtRestKeys,
    dir: &Path,
    bundles: &dyn RecoveryBundles,
) -> Result<AtRestKeys, AtRestError> {
    check(keys, dir.join(AT_REST_KEYS), bundles).await
}

/// Parses the contents of the file at `path`.
pub(crate) fn parse(path: PathBuf, file: &[u8]) -> Result<AtRestKeys, AtRestError> {
    AtRestKeys::parse(file).map_err(|source| AtRestError::Damaged { path, source })
}

/// Checks that every key under which something is sealed is present.
async fn check(
    keys: AtRestKeys,
    path: PathBuf,
    bundles: &dyn RecoveryBundles,
) -> Result<AtRestKeys, AtRestError> {
    let mut used = bundles.next_key(None).await?;
    while let Some(key) = used {
        if !keys.contains(key) {
            return Err(AtRestError::KeyMissing { path, key });
        }
        used = bundles.next_key(Some(key)).await?;
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use qpq_domain::{IdentityKey, StoreLimits, UnixMillis, Username};
    use qpq_ports::{Admission, BundlePut, NewAccount, NewBundle, Registration, Stores};
    use qpq_rpc::at_rest::{Place, Purpose};
    use qpq_store_embedded::EmbeddedStore;

    use super::*;
    use crate::secrets::tests::shared_dir;

    struct Node {
        dir: DataDir,
        stores: Stores,
        _temporary: tempfile::TempDir,
    }

    impl Node {
        async fn new() -> Self {
            let temporary = tempfile::tempdir().unwrap();
            let dir = DataDir::create(temporary.path()).unwrap();
            let store = EmbeddedStore::open(dir.path(), StoreLimits::default()).await.unwrap();
            Self { dir, stores: store.stores(), _temporary: temporary }
        }

        async fn load(&self) -> Result<AtRestKeys, String> {
            let loaded = load_or_create(&self.dir, &*self.stores.recovery_bundles).await;
            loaded.map_err(|error| error.to_string())
        }

        /// Stores a bundle of a new account.
        async fn seal(&self, keys: &AtRestKeys) {
            let identity = IdentityKey::new([1; 32]);
            let new = NewAccount {
                username: Username::parse("alice").unwrap(),
                identity,
                opaque_record: vec![1; 192],
                admission: Admission::Open,
                now: UnixMillis(1),
            };
            let Registration::Registered(account) =
                self.stores.accounts.register(new).await.unwrap()
            else {
                panic!("a free name");
            };
            let place = Place { purpose: Purpose::RecoveryBundle, identity: &identity, version: 1 };
            let sealed = keys.seal(place, b"a bundle");
            let (sealed, key) = (sealed.bytes, sealed.key);
            let bundle = NewBundle { account, replaces: 0, sealed, key, now: UnixMillis(1) };
            let stored = self.stores.recovery_bundles.put(bundle).await.unwrap();
            assert_eq!(stored, BundlePut::Stored);
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join(AT_REST_KEYS)
        }
    }

    #[tokio::test]
    async fn keys_are_created_once_also_for_a_database_without_bundles() {
        let node = Node::new().await;
        let keys = node.load().await.expect("nothing is sealed");
        let again = node.load().await.expect("the same file");
        assert!(keys.ids().eq(again.ids()));
        fs::remove_file(node.path()).unwrap();
        node.load().await.expect("still nothing is sealed");
    }

    #[tokio::test]
    async fn missing_keys_of_stored_bundles_are_an_error_that_names_the_file() {
        let node = Node::new().await;
        let keys = node.load().await.expect("nothing is sealed");
        node.seal(&keys).await;
        node.load().await.expect("the key is present");
        let file = fs::read(node.path()).unwrap();
        fs::remove_file(node.path()).unwrap();
        let error = node.load().await.expect_err("lost");
        assert!(error.starts_with(&format!("{} is missing", node.path().display())), "{error}");
        assert!(!node.path().exists(), "no file is created");
        fs::write(node.path(), AtRestKeys::generate(&mut OsRng)).unwrap();
        let error = node.load().await.expect_err("other keys");
        let key = keys.ids().next().unwrap();
        assert!(error.contains(&format!("does not contain the key {key}")), "{error}");
        fs::write(node.path(), &file[..63]).unwrap();
        let error = node.load().await.expect_err("damaged");
        assert!(error.contains("at-rest-keys is damaged"), "{error}");
        fs::write(node.path(), AtRestKeys::rotated(&file, &mut OsRng).unwrap()).unwrap();
        node.load().await.expect("old keys stay after a rotation");
    }

    #[test]
    fn an_edge_without_the_file_names_it_and_the_command_that_adds_it() {
        let dir = shared_dir();
        load_shared(dir.path()).expect("a complete directory");
        fs::remove_file(dir.path().join(AT_REST_KEYS)).unwrap();
        let error = load_shared(dir.path()).expect_err("missing").to_string();
        let command = format!("`qpq-admin add-at-rest-keys --dir {}`", dir.path().display());
        assert!(error.contains("at-rest-keys is missing") && error.contains(&command), "{error}");
        assert!(!dir.path().join(AT_REST_KEYS).exists(), "no file is created");
    }
}
