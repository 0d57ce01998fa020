//! Creating a profile, opening one, and logging out.
//!
//! Registration saves the profile before it reaches the server, so that a registered identity key
//! is never lost. After an interruption, another registration with the same password continues the
//! first one.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use qpq_domain::{SessionToken, Username};
use qpq_mls::{
    Identity,
    vault::{Salt, VaultKey},
};
use tokio::sync::Mutex;

use super::{
    Messenger, Shared,
    devices::{self, FIRST_DEVICE, check_name},
    inbox::NewKeys,
    store::{self, StateStore},
};
use crate::{
    client::{Client, LogoutScope, Session, blocking},
    error::{AuthError, CallError, Error, ProfileError},
    options::{Options, Trust},
    profile::{self, InUse, Profile, ProfileStatus, database_path, vault_path},
    secret::{ExportKey, Password},
};

/// An account that is to be registered.
#[derive(Debug, Clone, Copy)]
pub struct NewAccount<'a> {
    /// The name of the account.
    pub username: &'a Username,
    /// The password.
    pub password: &'a Password,
    /// The invite, if the server requires one.
    pub invite: Option<&'a str>,
    /// The name of the device on which the account is registered.
    pub device: &'a str,
}

impl Messenger {
    /// Registers an account and creates its profile in `dir`, which must not contain one. With
    /// [`Trust::FirstUse`] the server's certificate is pinned in the profile.
    ///
    /// # Errors
    /// After [`AuthError::UsernameTaken`] and other refusals of the server, no profile remains. If
    /// the server cannot be reached, the profile stays unfinished, and another call continues the
    /// registration. If the clock of this machine is wrong, the account is registered and others
    /// cannot write to it yet, as [`Messenger::are_keys_refused`] shows.
    pub async fn register(
        dir: &Path,
        options: Options,
        username: &Username,
        password: &Password,
        invite: Option<&str>,
    ) -> Result<Self, Error> {
        let account = NewAccount { username, password, invite, device: FIRST_DEVICE };
        Self::register_account(dir, options, account).await
    }

    /// Registers an account as [`Messenger::register`] does, with a name for its first device.
    pub async fn register_account(
        dir: &Path,
        options: Options,
        account: NewAccount<'_>,
    ) -> Result<Self, Error> {
        check_name(account.device)?;
        let in_use = profile::lock(dir).await?;
        match Profile::read(dir) {
            Ok(profile)
                if profile.status == ProfileStatus::Registering
                    && profile.username == *account.username =>
            {
                Box::pin(resume(in_use, options, profile, account)).await
            }
            Ok(_) => Err(ProfileError::Exists(dir.to_owned()).into()),
            Err(ProfileError::Missing(_)) => Box::pin(begin(in_use, options, account)).await,
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the profile in `dir` by logging in. Ends the session that was used before.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`], [`ProfileError`], and the errors of calls to the server.
    pub async fn unlock(dir: &Path, password: &Password) -> Result<Self, Error> {
        Self::unlock_or_reseal(dir, password, None).await
    }

    /// Opens the profile as [`Messenger::unlock`] does. If the password was changed on another
    /// device, `kept`, the key of an earlier [`Messenger::vault_key`], opens the state, which is
    /// then sealed for the new password.
    pub async fn unlock_or_reseal(
        dir: &Path,
        password: &Password,
        kept: Option<VaultKey>,
    ) -> Result<Self, Error> {
        let profile = registered(dir)?;
        let in_use = profile::enter(dir).await?;
        log_in(in_use, profile, password, kept).await
    }

    /// Opens a profile as [`Messenger::unlock`] does, for a server with a new address or
    /// certificate. Once the login there has succeeded, the profile has the new address and trust.
    pub async fn unlock_at(
        dir: &Path,
        server: String,
        trust: Trust,
        password: &Password,
    ) -> Result<Self, Error> {
        let profile = registered(dir)?;
        let in_use = profile::enter(dir).await?;
        let mut moved = Profile { server, trust, ..profile };
        if moved.trust == Trust::FirstUse {
            let client = Client::new(moved.options()).map_err(CallError::from)?;
            moved.trust = Trust::Pinned(client.connect().await?);
            client.close().await;
        }
        let messenger = log_in(in_use, moved, password, None).await?;
        messenger.profile().write(dir)?;
        Ok(messenger)
    }

    /// Opens the profile in `dir` with a key from [`Messenger::vault_key`], and continues the saved
    /// session. Makes no call to the server.
    pub async fn unlock_with_key(dir: &Path, key: VaultKey) -> Result<Self, Error> {
        let profile = registered(dir)?;
        let in_use = profile::enter(dir).await?;
        let client = Client::new(profile.options()).map_err(CallError::from)?;
        client.set_device(profile.device);
        let store = StateStore::open(in_use, key).await?;
        client.set_session(store.read(|state| Ok(state.token()?)).await?);
        assemble(client, profile, store).await
    }

    /// Ends the session, or all of the account's. The profile stays, and can be unlocked with the
    /// password.
    pub async fn logout(self, scope: LogoutScope) -> Result<u32, Error> {
        let revoked = self.client().logout(scope).await?;
        self.store().change(|state| Ok(state.set_token(None)?)).await?;
        self.client().close().await;
        Ok(revoked)
    }

    /// Ends a session that is no longer needed. If the call fails, the session expires later.
    async fn end_session(&self, token: Option<SessionToken>) {
        let Some(token) = token else { return };
        if let Err(error) = self.client().end_session(token).await {
            tracing::debug!(%error, "the session used before was not ended");
        }
    }
}

async fn begin(
    in_use: InUse,
    mut options: Options,
    account: NewAccount<'_>,
) -> Result<Messenger, Error> {
    let NewAccount { username, password, invite, device } = account;
    let client = Client::new(options.clone()).map_err(CallError::from)?;
    let seen = client.connect().await?;
    if options.trust == Trust::FirstUse {
        options.trust = Trust::Pinned(seen);
    }
    let identity = Identity::generate();
    let mut profile = Profile {
        username: username.clone(),
        server: options.server,
        trust: options.trust,
        identity: identity.public(),
        status: ProfileStatus::Registering,
        device: None,
    };
    let pending = client.begin_registration(username, password).await?;
    let key = derive(&pending.password, &pending.export_key, Salt::random()).await;
    let dir = in_use.dir.clone();
    let store = StateStore::create(in_use, key, identity.clone(), username.clone()).await?;
    let device = device.to_owned();
    store.change(move |state| state.name_device(&device)).await?;
    profile.write(&dir)?;
    if let Err(error) = client.finish_registration(&pending, &identity, invite).await {
        // The profile is needed unless it is certain that no account with this identity exists.
        if matches!(&error, AuthError::Call(error) if error.is_temporary()) {
            return Err(error.into());
        }
        discard(&dir)?;
        return Err(error.into());
    }
    let session = client.login(username, password).await?;
    adopt(&store, &session).await?;
    profile.status = ProfileStatus::Registered;
    profile.device = devices::register_this(&client, &store).await?;
    profile.write(&dir)?;
    let messenger = assemble(client, profile, store).await?;
    messenger.settle_keys(NewKeys::Needed).await?;
    Ok(messenger)
}

/// Continues a registration that may or may not have reached the server.
async fn resume(
    in_use: InUse,
    options: Options,
    mut profile: Profile,
    account: NewAccount<'_>,
) -> Result<Messenger, Error> {
    let dir = in_use.dir.clone();
    let client = Client::new(profile.options()).map_err(CallError::from)?;
    let session = match client.login(&profile.username, account.password).await {
        Ok(session) => session,
        // Either the registration did not reach the server, or this is another password. In the
        // second case the username proves to be taken.
        Err(AuthError::WrongPassword) => {
            let set_aside = set_aside(&dir)?;
            let begun = begin(in_use, options, account).await;
            if let Err(Error::Auth(refusal)) = &begun
                && may_exist(refusal)
            {
                for (path, aside) in &set_aside {
                    rename(aside, path)?;
                }
                profile.write(&dir)?;
            }
            if let Err(Error::Auth(AuthError::UsernameTaken)) = begun {
                return Err(AuthError::WrongPassword.into());
            }
            if begun.is_ok() {
                set_aside.iter().try_for_each(|(_, aside)| remove(aside))?;
            }
            return begun;
        }
        Err(error) => return Err(error.into()),
    };
    let key = existing_key(&dir, &session.password, &session.export_key).await?;
    let store = StateStore::open(in_use, key).await?;
    adopt(&store, &session).await?;
    devices::bind_session(&client, &store).await?;
    profile.status = ProfileStatus::Registered;
    profile.device = devices::register_this(&client, &store).await?;
    profile.write(&dir)?;
    let messenger = assemble(client, profile, store).await?;
    messenger.settle_keys(NewKeys::Needed).await?;
    Ok(messenger)
}

/// Returns whether an account with the username may exist after a registration was refused. A
/// server that refuses the invite does not say.
fn may_exist(refusal: &AuthError) -> bool {
    matches!(
        refusal,
        AuthError::UsernameTaken
            | AuthError::InviteRequired
            | AuthError::InviteInvalid
            | AuthError::RegistrationClosed
    )
}

/// Returns the profile in `dir`, if its registration is complete.
pub(super) fn registered(dir: &Path) -> Result<Profile, ProfileError> {
    match Profile::read(dir)? {
        Profile { status: ProfileStatus::Registering, .. } => {
            Err(ProfileError::Unfinished(dir.to_owned()))
        }
        profile => Ok(profile),
    }
}

/// Opens a profile by logging in. If the state is sealed for another password, `kept` opens it.
async fn log_in(
    in_use: InUse,
    profile: Profile,
    password: &Password,
    kept: Option<VaultKey>,
) -> Result<Messenger, Error> {
    let dir = in_use.dir.clone();
    let client = Client::new(profile.options()).map_err(CallError::from)?;
    client.set_device(profile.device);
    let session = client.login(&profile.username, password).await?;
    let key = existing_key(&dir, &session.password, &session.export_key).await?;
    let store = match (StateStore::open(in_use, key.clone()).await, kept) {
        (Err(ProfileError::WrongKey), Some(kept)) => {
            let store = StateStore::open(profile::enter(&dir).await?, kept).await?;
            store.replace_key(key).await?;
            store
        }
        (opened, _) => opened?,
    };
    // The server has this password, so an interrupted change to another one did not reach it.
    store.forget_next_key().await?;
    let before = adopt(&store, &session).await?;
    let export_key = session.export_key;
    store.change(move |state| Ok(state.note_export_key(&export_key)?)).await?;
    if profile.device.is_none() {
        devices::bind_session(&client, &store).await?;
    }
    let messenger = assemble(client, profile, store).await?;
    messenger.end_session(before).await;
    Ok(messenger)
}

/// Saves a new session; returns the one used before.
pub(super) async fn adopt(
    store: &StateStore,
    session: &Session,
) -> Result<Option<SessionToken>, Error> {
    let token = session.token.clone();
    store
        .change(move |state| {
            let before = state.token()?;
            state.set_token(Some(&token))?;
            Ok(before)
        })
        .await
}

pub(super) async fn assemble(
    client: Client,
    profile: Profile,
    store: StateStore,
) -> Result<Messenger, Error> {
    let identity = store.read(|state| Ok(state.me())).await?;
    if identity != profile.identity {
        let reason = "the encrypted state is another account's".to_owned();
        return Err(ProfileError::Damaged { path: "profile.json".into(), reason }.into());
    }
    store.share().await?;
    let shared = Shared {
        client,
        profile,
        store,
        reading: Mutex::default(),
        verified: AtomicBool::default(),
        flushing: Mutex::default(),
        changing: Mutex::default(),
        keys_checked: AtomicBool::default(),
        keys_refused: AtomicBool::default(),
    };
    let messenger = Messenger { shared: Arc::new(shared) };
    messenger.note_acquaintances().await?;
    Ok(messenger)
}

/// Derives the key of the state in `dir`, with the salt that the state has.
pub(super) async fn existing_key(
    dir: &Path,
    password: &Password,
    export_key: &ExportKey,
) -> Result<VaultKey, Error> {
    let dir = dir.to_owned();
    let salt = blocking(move || store::salt(&dir)).await?;
    Ok(derive(password, export_key, salt).await)
}

pub(super) async fn derive(password: &Password, export_key: &ExportKey, salt: Salt) -> VaultKey {
    let (password, export_key) = (password.clone(), export_key.clone());
    blocking(move || VaultKey::derive(password.expose(), export_key.expose(), salt)).await
}

/// Removes an incomplete profile.
pub(super) fn discard(dir: &Path) -> Result<(), ProfileError> {
    remove(&dir.join("profile.json"))?;
    state_files(dir).iter().try_for_each(|path| remove(path))
}

/// Returns every file that may contain a profile's state.
fn state_files(dir: &Path) -> [PathBuf; 4] {
    let database = database_path(dir);
    let wal = database.with_extension("db-wal");
    let index = database.with_extension("db-shm");
    [wal, index, database, vault_path(dir)]
}

/// Renames the files of a profile's state; returns the old and the new names.
fn set_aside(dir: &Path) -> Result<Vec<(PathBuf, PathBuf)>, ProfileError> {
    let mut renamed = Vec::new();
    for path in state_files(dir) {
        if path.exists() {
            let mut aside = path.clone().into_os_string();
            aside.push(".unfinished");
            rename(&path, aside.as_ref())?;
            renamed.push((path, aside.into()));
        }
    }
    Ok(renamed)
}

fn rename(from: &Path, to: &Path) -> Result<(), ProfileError> {
    fs::rename(from, to).map_err(|source| ProfileError::Io { path: from.to_owned(), source })
}

fn remove(path: &Path) -> Result<(), ProfileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ProfileError::Io { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
