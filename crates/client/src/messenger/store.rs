//! A profile's state on disk. Each change is committed before its result is returned.
//!
//! Nothing of the state stays in memory between transactions, so other processes may use the same
//! profile. An operation that only one process may perform at a time has a `Turn`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use qpq_mls::{
    database::{Database, DatabaseError},
    vault::{self, Salt, VaultError, VaultKey},
};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::{legacy, now, state::State};
use crate::{
    client::blocking,
    error::{Error, ProfileError},
    profile::{InUse, database_path, vault_path},
};

/// The state of a profile that this process uses.
pub(crate) struct StateStore {
    open: Arc<Mutex<Open>>,
    dir: PathBuf,
}

struct Open {
    database: Database,
    key: VaultKey,
    in_use: InUse,
}

impl StateStore {
    /// Creates the state of a new profile.
    pub(crate) async fn create(
        in_use: InUse,
        key: VaultKey,
        identity: qpq_mls::Identity,
        username: qpq_domain::Username,
    ) -> Result<Self, ProfileError> {
        Self::create_with(in_use, key, move |database| {
            State::create(database, identity, username)?.save()
        })
        .await
    }

    /// Creates the state of a new profile, with the content that `fill` writes.
    pub(crate) async fn create_with(
        in_use: InUse,
        key: VaultKey,
        fill: impl FnOnce(&Database) -> Result<(), DatabaseError> + Send + 'static,
    ) -> Result<Self, ProfileError> {
        let dir = in_use.dir.clone();
        let open = blocking(move || {
            let path = database_path(&in_use.dir);
            let database =
                Database::create(&path, &key, fill).map_err(|error| explain(&in_use.dir, error))?;
            Ok::<_, ProfileError>(Open { database, key, in_use })
        })
        .await?;
        Ok(Self { open: Arc::new(Mutex::new(open)), dir })
    }

    /// Opens a profile's state. The state of an earlier release is imported first.
    pub(crate) async fn open(in_use: InUse, key: VaultKey) -> Result<Self, ProfileError> {
        let dir = in_use.dir.clone();
        let open = blocking(move || {
            let database = open(&in_use.dir, &key)?;
            Ok::<_, ProfileError>(Open { database, key, in_use })
        })
        .await?;
        Ok(Self { open: Arc::new(Mutex::new(open)), dir })
    }

    /// Changes the state, in one transaction. If `change` or the commit fails, nothing has changed.
    /// A transaction that has begun ends even if the future is dropped.
    pub(crate) async fn change<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut State) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        let open: OwnedMutexGuard<Open> = Arc::clone(&self.open).lock_owned().await;
        blocking(move || {
            open.database.write(|| {
                let mut state = State::open(&open.database)?;
                let result = change(&mut state)?;
                state.save()?;
                Ok(result)
            })
        })
        .await
        .map_err(|error| self.name(error))
    }

    /// Reads the state as it was last committed.
    pub(crate) async fn read<R: Send + 'static>(
        &self,
        look: impl FnOnce(&State) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        let open: OwnedMutexGuard<Open> = Arc::clone(&self.open).lock_owned().await;
        blocking(move || open.database.read(|| look(&State::open(&open.database)?)))
            .await
            .map_err(|error| self.name(error))
    }

    /// Lets other processes use the profile too.
    pub(crate) async fn share(&self) -> Result<(), ProfileError> {
        self.open.lock().await.in_use.share()
    }

    /// Lets another key open the state too, until [`StateStore::replace_key`] or
    /// [`StateStore::forget_next_key`]. A later open with that key makes it the only one.
    pub(crate) async fn prepare_key(&self, next: VaultKey) -> Result<(), ProfileError> {
        self.rekey(move |open| open.database.prepare_key(&open.key, &next)).await
    }

    /// Makes another key the only one that opens the state.
    pub(crate) async fn replace_key(&self, next: VaultKey) -> Result<(), ProfileError> {
        self.rekey(move |open| {
            open.database.replace_key(&open.key, &next)?;
            open.key = next;
            Ok(())
        })
        .await
    }

    /// Removes the key of [`StateStore::prepare_key`].
    pub(crate) async fn forget_next_key(&self) -> Result<(), ProfileError> {
        self.rekey(|open| open.database.forget_next_key()).await
    }

    async fn rekey(
        &self,
        change: impl FnOnce(&mut Open) -> Result<(), DatabaseError> + Send + 'static,
    ) -> Result<(), ProfileError> {
        let mut open: OwnedMutexGuard<Open> = Arc::clone(&self.open).lock_owned().await;
        let changed = blocking(move || change(&mut open)).await;
        changed.map_err(|error| explain(&self.dir, error))
    }

    pub(crate) async fn key(&self) -> VaultKey {
        self.open.lock().await.key.clone()
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds the path of the profile to an error of its state.
    fn name(&self, error: Error) -> Error {
        match error {
            Error::State(error) | Error::Mls(qpq_mls::Error::Database(error)) => {
                explain(&self.dir, error).into()
            }
            other => other,
        }
    }

    #[cfg(test)]
    async fn limit_pages(&self, pages: u32) {
        self.open.lock().await.database.limit_pages(pages).unwrap();
    }
}

/// Returns the salt with which the key of the profile in `dir` was derived.
pub(super) fn salt(dir: &Path) -> Result<Salt, ProfileError> {
    let path = database_path(dir);
    if exists(&path)? {
        return Database::salt(&path).map_err(|error| explain(dir, error));
    }
    let path = vault_path(dir);
    match vault::read_salt(&path) {
        Ok(Some(salt)) => Ok(salt),
        Ok(None) => Err(ProfileError::Missing(dir.to_owned())),
        Err(error) => Err(explain_vault(path, error)),
    }
}

/// Opens the database in `dir`. If there is only a vault, imports the vault into a new database.
///
/// The database appears under its name when the import is complete and on the disk. Until then the
/// vault is the state, and after a crash the import begins again. From then on the database is the
/// state, and a vault that is still there is removed.
fn open(dir: &Path, key: &VaultKey) -> Result<Database, ProfileError> {
    let (database, vault) = (database_path(dir), vault_path(dir));
    if exists(&database)? {
        let opened = Database::open(&database, key).map_err(|error| explain(dir, error))?;
        remove(&vault)?;
        return Ok(opened);
    }
    let content = match vault::read(&vault, key) {
        Ok(Some(content)) => content,
        Ok(None) => return Err(ProfileError::Missing(dir.to_owned())),
        Err(error) => return Err(explain_vault(vault, error)),
    };
    let created = Database::create(&database, key, |new| legacy::import(new, &content, now()))
        .map_err(|error| match error {
            DatabaseError::Damaged(reason) => ProfileError::Damaged { path: vault.clone(), reason },
            error => explain(dir, error),
        })?;
    remove(&vault)?;
    Ok(created)
}

fn exists(path: &Path) -> Result<bool, ProfileError> {
    path.try_exists().map_err(|source| ProfileError::Io { path: path.to_owned(), source })
}

fn remove(path: &Path) -> Result<(), ProfileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ProfileError::Io { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

fn explain(dir: &Path, error: DatabaseError) -> ProfileError {
    let path = database_path(dir);
    match error {
        DatabaseError::WrongKey => ProfileError::WrongKey,
        DatabaseError::Busy => ProfileError::InUse(dir.to_owned()),
        DatabaseError::Full => ProfileError::Io { path, source: io::ErrorKind::StorageFull.into() },
        DatabaseError::Io(reason) => ProfileError::Io { path, source: io::Error::other(reason) },
        DatabaseError::Damaged(reason) => ProfileError::Damaged { path, reason },
        other => ProfileError::Damaged { path, reason: other.to_string() },
    }
}

fn explain_vault(path: PathBuf, error: VaultError) -> ProfileError {
    match error {
        VaultError::Io(source) => ProfileError::Io { path, source },
        VaultError::WrongKeyOrDamaged => ProfileError::WrongKey,
        other => ProfileError::Damaged { path, reason: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::{IdentityKey, UnixMillis, Username};

    use super::*;
    use crate::{
        messenger::log::{ConversationId, Event},
        profile,
    };

    const CONVERSATION: ConversationId = ConversationId::Direct(IdentityKey::new([1; 32]));

    async fn add(store: &StateStore, size: usize) -> Result<(), Error> {
        store
            .change(move |state| {
                let event = Event::Unreadable { from: None, reason: "x".repeat(size) };
                state.log.push(Some(CONVERSATION), UnixMillis(1), event)?;
                Ok(())
            })
            .await
    }

    #[tokio::test]
    async fn a_change_that_cannot_be_saved_has_no_effect() {
        let dir = tempfile::tempdir().unwrap();
        let key = VaultKey::from_bytes(&[1; 48]);
        let in_use = profile::lock(dir.path()).await.unwrap();
        let name = Username::parse("alice").unwrap();
        let identity = qpq_mls::Identity::generate();
        let store = StateStore::create(in_use, key, identity, name).await.unwrap();
        add(&store, 10).await.unwrap();
        store.limit_pages(1).await;
        let refused = add(&store, 1 << 20).await;
        let Err(Error::Profile(ProfileError::Io { path, source })) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!((path, source.kind()), (database_path(dir.path()), io::ErrorKind::StorageFull));
        store.limit_pages(u32::MAX - 1).await;
        add(&store, 10).await.unwrap();
        let count = store.read(|state| Ok(state.log.count_unseen(&CONVERSATION)?)).await.unwrap();
        assert_eq!(count, 2);
    }
}
