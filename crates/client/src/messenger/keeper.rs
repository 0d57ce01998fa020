//! Keeps a profile's state: every change is on disk before anyone sees its result.

use std::sync::Arc;

use qpq_mls::vault::{self, VaultError, VaultKey};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::state::State;
use crate::{
    client::blocking,
    error::{Error, ProfileError},
    profile::{Locked, vault_path},
};

/// The state of a profile that is locked for this process.
pub(crate) struct Keeper {
    held: Arc<Mutex<Held>>,
}

struct Held {
    locked: Locked,
    key: VaultKey,
    /// `None` after a change that failed half way: what counts is on disk, and is read again.
    state: Option<State>,
}

impl Keeper {
    /// Saves a new state.
    pub(crate) async fn create(
        locked: Locked,
        key: VaultKey,
        state: State,
    ) -> Result<Self, ProfileError> {
        let held = blocking(move || {
            let mut held = Held { locked, key, state: Some(state) };
            held.save()?;
            Ok::<_, ProfileError>(held)
        })
        .await?;
        Ok(Self { held: Arc::new(Mutex::new(held)) })
    }

    /// Reads a saved state.
    pub(crate) async fn open(locked: Locked, key: VaultKey) -> Result<Self, ProfileError> {
        let held = blocking(move || {
            let mut held = Held { locked, key, state: None };
            held.load()?;
            Ok::<_, ProfileError>(held)
        })
        .await?;
        Ok(Self { held: Arc::new(Mutex::new(held)) })
    }

    /// Changes the state and saves it. If `change` or the saving fails, nothing has changed. Once
    /// begun it ends even if the future is dropped.
    pub(crate) async fn change<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut State) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        let mut held: OwnedMutexGuard<Held> = Arc::clone(&self.held).lock_owned().await;
        blocking(move || {
            held.load()?;
            let mut state = held.state.take().expect("it was loaded");
            let result = change(&mut state)?;
            held.state = Some(state);
            if let Err(error) = held.save() {
                held.state = None;
                return Err(error.into());
            }
            Ok(result)
        })
        .await
    }

    /// Looks at the state.
    pub(crate) async fn read<R>(&self, look: impl FnOnce(&State) -> R) -> Result<R, Error> {
        let mut held = self.held.lock().await;
        held.load()?;
        Ok(look(held.state.as_ref().expect("it was loaded")))
    }

    pub(crate) async fn key(&self) -> VaultKey {
        self.held.lock().await.key.clone()
    }
}

impl Held {
    fn load(&mut self) -> Result<(), ProfileError> {
        if self.state.is_some() {
            return Ok(());
        }
        let path = vault_path(&self.locked.dir);
        let content = match vault::read(&path, &self.key) {
            Ok(Some(content)) => content,
            Ok(None) => return Err(ProfileError::Missing(self.locked.dir.clone())),
            Err(error) => return Err(self.explain(error)),
        };
        let state = State::decode(&content)
            .map_err(|error| ProfileError::Damaged { path, reason: error.to_string() })?;
        self.state = Some(state);
        Ok(())
    }

    fn save(&mut self) -> Result<(), ProfileError> {
        let content = self.state.as_ref().expect("only what is there is saved").encode();
        vault::write(&vault_path(&self.locked.dir), &self.key, &content)
            .map_err(|error| self.explain(error))
    }

    fn explain(&self, error: VaultError) -> ProfileError {
        let path = vault_path(&self.locked.dir);
        match error {
            VaultError::Io(source) => ProfileError::Io { path, source },
            VaultError::WrongKeyOrDamaged => ProfileError::WrongKey,
            other => ProfileError::Damaged { path, reason: other.to_string() },
        }
    }
}
