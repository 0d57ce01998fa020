//! Making a profile, opening one, and logging out.
//!
//! Registration saves the profile before it reaches the server: an identity key that is registered
//! is never lost. If it is interrupted, registering again with the same password goes on where it
//! was.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use qpq_domain::{Seq, SessionToken, Username};
use qpq_mls::{
    Identity,
    vault::{self, Salt, VaultKey},
};
use tokio::sync::Mutex;

use super::{Messenger, Shared, inbox::NewKeys, keeper::Keeper, state::State};
use crate::{
    client::{Client, LogoutScope, Session, blocking},
    error::{AuthError, CallError, Error, ProfileError},
    options::{Options, Trust},
    profile::{self, Locked, Profile, Status, vault_path},
    secret::{ExportKey, Password},
};

impl Messenger {
    /// Registers an account and makes its profile in `dir`, which must hold none yet. With
    /// [`Trust::FirstUse`] the server's certificate is pinned in the profile.
    ///
    /// # Errors
    /// [`AuthError::UsernameTaken`] and whatever else the server refuses with leave no profile
    /// behind; where the server cannot be reached, the profile stays unfinished, and calling this
    /// again goes on. With a clock that the server does not agree with, the account is registered
    /// and [`Messenger::are_keys_refused`] says that others cannot write to it yet.
    pub async fn register(
        dir: &Path,
        options: Options,
        username: &Username,
        password: &Password,
        invite: Option<&str>,
    ) -> Result<Self, Error> {
        let locked = profile::lock(dir).await?;
        match Profile::read(dir) {
            Ok(profile)
                if profile.status == Status::Registering && profile.username == *username =>
            {
                Box::pin(resume(locked, options, profile, password, invite)).await
            }
            Ok(_) => Err(ProfileError::Exists(dir.to_owned()).into()),
            Err(ProfileError::Missing(_)) => {
                Box::pin(begin(locked, options, username, password, invite)).await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the profile in `dir` by logging in. The session that was used before ends.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`], [`ProfileError`], and whatever keeps the server from being
    /// reached.
    pub async fn unlock(dir: &Path, password: &Password) -> Result<Self, Error> {
        let profile = registered(dir)?;
        let locked = profile::lock(dir).await?;
        log_in(locked, profile, password).await
    }

    /// As [`Messenger::unlock`], where the server has moved or is known by another certificate:
    /// once the login has succeeded there, the profile has the new address and trust.
    pub async fn unlock_at(
        dir: &Path,
        server: String,
        trust: Trust,
        password: &Password,
    ) -> Result<Self, Error> {
        let profile = registered(dir)?;
        let locked = profile::lock(dir).await?;
        let mut moved = Profile { server, trust, ..profile };
        if moved.trust == Trust::FirstUse {
            let client = Client::new(moved.options()).map_err(CallError::from)?;
            moved.trust = Trust::Pinned(client.connect().await?);
            client.close().await;
        }
        let messenger = log_in(locked, moved, password).await?;
        messenger.profile().write(dir)?;
        Ok(messenger)
    }

    /// Opens the profile in `dir` with a key that [`Messenger::vault_key`] gave, and goes on with
    /// the saved session. Asks the server nothing.
    pub async fn unlock_with_key(dir: &Path, key: VaultKey) -> Result<Self, Error> {
        let profile = registered(dir)?;
        let locked = profile::lock(dir).await?;
        let client = Client::new(profile.options()).map_err(CallError::from)?;
        let keeper = Keeper::open(locked, key).await?;
        client.set_session(keeper.read(|state| state.token.clone()).await?);
        assemble(client, profile, keeper).await
    }

    /// Ends the session, or all of the account's. The profile stays; unlock it with the password to
    /// use it again.
    pub async fn logout(self, scope: LogoutScope) -> Result<u32, Error> {
        let revoked = self.client().logout(scope).await?;
        self.keeper()
            .change(|state| {
                state.token = None;
                Ok(())
            })
            .await?;
        self.client().close().await;
        Ok(revoked)
    }

    /// Ends a session that is not needed any more. If that fails it ends by itself some day.
    async fn end_session(&self, token: Option<SessionToken>) {
        let Some(token) = token else { return };
        if let Err(error) = self.client().end_session(token).await {
            tracing::debug!(%error, "the session used before was not ended");
        }
    }
}

async fn begin(
    locked: Locked,
    mut options: Options,
    username: &Username,
    password: &Password,
    invite: Option<&str>,
) -> Result<Messenger, Error> {
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
        status: Status::Registering,
    };
    let pending = client.begin_registration(username, password).await?;
    let key = derive(&pending.password, &pending.export_key, Salt::random()).await;
    let dir = locked.dir.clone();
    let keeper =
        Keeper::create(locked, key, State::new(identity.clone(), username.clone())).await?;
    profile.write(&dir)?;
    if let Err(error) = client.finish_registration(&pending, &identity, invite).await {
        // Unless it is certain that there is no account with this identity, the profile is needed.
        if matches!(&error, AuthError::Call(error) if error.is_temporary()) {
            return Err(error.into());
        }
        discard(&dir)?;
        return Err(error.into());
    }
    let session = client.login(username, password).await?;
    adopt(&keeper, &session).await?;
    profile.status = Status::Registered;
    profile.write(&dir)?;
    let messenger = assemble(client, profile, keeper).await?;
    messenger.settle_keys(NewKeys::Needed).await?;
    Ok(messenger)
}

/// Goes on with a registration that may or may not have reached the server.
async fn resume(
    locked: Locked,
    options: Options,
    mut profile: Profile,
    password: &Password,
    invite: Option<&str>,
) -> Result<Messenger, Error> {
    let dir = locked.dir.clone();
    let client = Client::new(profile.options()).map_err(CallError::from)?;
    let session = match client.login(&profile.username, password).await {
        Ok(session) => session,
        // Either it did not reach the server, or this is another password: then the name turns out
        // to be taken.
        Err(AuthError::WrongPassword) => {
            let set_aside = vault_path(&dir).with_extension("unfinished");
            rename(&vault_path(&dir), &set_aside)?;
            let begun = begin(locked, options, &profile.username, password, invite).await;
            if let Err(Error::Auth(AuthError::UsernameTaken)) = begun {
                rename(&set_aside, &vault_path(&dir))?;
                profile.write(&dir)?;
                return Err(AuthError::WrongPassword.into());
            }
            if begun.is_ok() {
                fs::remove_file(&set_aside)
                    .map_err(|source| ProfileError::Io { path: set_aside, source })?;
            }
            return begun;
        }
        Err(error) => return Err(error.into()),
    };
    let key = existing_key(&dir, &session.password, &session.export_key).await?;
    let keeper = Keeper::open(locked, key).await?;
    adopt(&keeper, &session).await?;
    profile.status = Status::Registered;
    profile.write(&dir)?;
    let messenger = assemble(client, profile, keeper).await?;
    messenger.settle_keys(NewKeys::Needed).await?;
    Ok(messenger)
}

/// The profile in `dir`, if its registration is complete.
fn registered(dir: &Path) -> Result<Profile, ProfileError> {
    match Profile::read(dir)? {
        Profile { status: Status::Registering, .. } => {
            Err(ProfileError::Unfinished(dir.to_owned()))
        }
        profile => Ok(profile),
    }
}

/// Opens a locked profile by logging in.
async fn log_in(locked: Locked, profile: Profile, password: &Password) -> Result<Messenger, Error> {
    let client = Client::new(profile.options()).map_err(CallError::from)?;
    let session = client.login(&profile.username, password).await?;
    let key = existing_key(&locked.dir, &session.password, &session.export_key).await?;
    let keeper = Keeper::open(locked, key).await?;
    let before = adopt(&keeper, &session).await?;
    let messenger = assemble(client, profile, keeper).await?;
    messenger.end_session(before).await;
    Ok(messenger)
}

/// Saves a new session; answers the one used before.
async fn adopt(keeper: &Keeper, session: &Session) -> Result<Option<SessionToken>, Error> {
    let token = session.token.clone();
    keeper.change(move |state| Ok(state.token.replace(token))).await
}

async fn assemble(client: Client, profile: Profile, keeper: Keeper) -> Result<Messenger, Error> {
    let identity = keeper.read(State::me).await?;
    if identity != profile.identity {
        let reason = "the encrypted state is another account's".to_owned();
        return Err(ProfileError::Damaged { path: "profile.json".into(), reason }.into());
    }
    let shared = Shared {
        client,
        profile,
        keeper,
        acked: Mutex::new(Seq::ZERO),
        flushing: Mutex::default(),
        keys_checked: AtomicBool::default(),
        keys_refused: AtomicBool::default(),
    };
    Ok(Messenger { shared: Arc::new(shared) })
}

async fn existing_key(
    dir: &Path,
    password: &Password,
    export_key: &ExportKey,
) -> Result<VaultKey, Error> {
    let path = vault_path(dir);
    let salt = match vault::read_salt(&path) {
        Ok(Some(salt)) => salt,
        Ok(None) => return Err(ProfileError::Missing(dir.to_owned()).into()),
        Err(error) => return Err(ProfileError::Damaged { path, reason: error.to_string() }.into()),
    };
    Ok(derive(password, export_key, salt).await)
}

async fn derive(password: &Password, export_key: &ExportKey, salt: Salt) -> VaultKey {
    let (password, export_key) = (password.clone(), export_key.clone());
    blocking(move || VaultKey::derive(password.expose(), export_key.expose(), salt)).await
}

/// Removes a profile that came to nothing.
fn discard(dir: &Path) -> Result<(), ProfileError> {
    for path in [dir.join("profile.json"), vault_path(dir)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(|source| ProfileError::Io { path, source })?,
        }
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<(), ProfileError> {
    fs::rename(from, to).map_err(|source| ProfileError::Io { path: from.to_owned(), source })
}
