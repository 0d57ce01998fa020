//! Changing the password: on the server, and of the state on disk, whose key depends on the
//! password.
//!
//! Before the call the state is sealed for the new password too. So after a crash at any point the
//! state opens with the password that the server has. The first login with the new password then
//! removes the old one, and a login with the old password removes the new one.

use std::path::Path;

use super::{
    Messenger, devices,
    open::{adopt, assemble, existing_key, registered},
    store::StateStore,
};
use crate::{
    client::{Client, PendingPasswordChange},
    error::{CallError, Error},
    profile,
    secret::Password,
};

/// Maximum attempts while connections are lost before the server has received the change.
const MAX_ATTEMPTS: u32 = 3;

/// The result of a change of the password.
#[derive(Debug)]
pub struct PasswordChanged {
    /// The messenger of the profile, which the new password opens.
    pub messenger: Messenger,
    /// The number of other sessions that were ended; `None` if that answer was lost. There are none
    /// left in either case.
    pub ended_sessions: Option<u32>,
}

impl Messenger {
    /// Changes the password of the account, ends its other sessions, and seals the state in `dir`
    /// for the new password, and the recovery bundle if this device keeps it. No other process may
    /// use the profile meanwhile.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`](crate::AuthError::WrongPassword) if `old` is wrong, and
    /// [`AuthError::PasswordRefused`](crate::AuthError::PasswordRefused) if `new` cannot be a
    /// password. After [`Error::PasswordUncertain`] the profile opens with the password that the
    /// server has, which may be either one. After other errors the password is unchanged.
    pub async fn change_password(
        dir: &Path,
        old: &Password,
        new: &Password,
    ) -> Result<PasswordChanged, Error> {
        let profile = registered(dir)?;
        let in_use = profile::lock(dir).await?;
        let client = Client::new(profile.options()).map_err(CallError::from)?;
        client.set_device(profile.device);
        let session = client.login(&profile.username, old).await?;
        let key = existing_key(dir, &session.password, &session.export_key).await?;
        let store = StateStore::open(in_use, key).await?;
        // The login has shown that the server has the old password.
        store.forget_next_key().await?;
        adopt(&store, &session).await?;
        if profile.device.is_none() {
            devices::bind_session(&client, &store).await?;
        }
        let mut attempts = 0;
        let ended_sessions = loop {
            attempts += 1;
            let pending = client.begin_password_change(&profile.username, new).await?;
            let next = existing_key(dir, &pending.password, &pending.export_key).await?;
            store.prepare_key(next.clone()).await?;
            match change(&client, &pending).await {
                Change::Done(ended) => {
                    store.replace_key(next).await?;
                    let export_key = pending.export_key;
                    store.change(move |state| Ok(state.note_export_key(&export_key)?)).await?;
                    break ended;
                }
                Change::Refused(error) if error.is_temporary() && attempts < MAX_ATTEMPTS => {}
                Change::Refused(error) => {
                    store.forget_next_key().await?;
                    return Err(error.into());
                }
                Change::Uncertain(error) => return Err(Error::PasswordUncertain(error)),
            }
        };
        let messenger = assemble(client, profile, store).await?;
        // If this fails, the next read of the inbox repeats it, or the next login after a crash.
        if let Err(error) = messenger.update_recovery().await {
            tracing::warn!(%error, "recovery bundle not sealed for the new password yet");
        }
        Ok(PasswordChanged { messenger, ended_sessions })
    }
}

/// The outcome of the call.
enum Change {
    /// The password was changed, and this number of sessions ended, if the answer arrived.
    Done(Option<u32>),
    /// The password is unchanged.
    Refused(CallError),
    /// The server cannot be asked whether the password was changed.
    Uncertain(CallError),
}

async fn change(client: &Client, pending: &PendingPasswordChange) -> Change {
    let lost = match client.finish_password_change(pending).await {
        Ok(ended) => return Change::Done(Some(ended)),
        Err(error) if error.server().is_some_and(|error| !error.is_uncertain()) => {
            return Change::Refused(error);
        }
        Err(error) => error,
    };
    match client.has_changed_password(pending).await {
        Ok(true) => Change::Done(None),
        Ok(false) => Change::Refused(lost),
        Err(error) => Change::Uncertain(error),
    }
}
