//! Recovery: a bundle on the server with which an account that has lost all devices is restored.
//!
//! The bundle contains what a new device receives from an old one ([`super::link`]). It opens with
//! the password, through the OPAQUE export key, or with a recovery code. Fetching it needs a login,
//! so the code alone restores nothing: it opens a bundle that was sealed under an earlier password.
//!
//! One device keeps the bundle up to date: the one that has created the code last, or was restored.
//! It stores a new bundle at the end of a read of the inbox, at most once a minute, if
//! conversations or people have changed. A bundle is saved before it is sent, so that a repeat
//! after a crash is recognized by the server. If another device has stored a bundle, this one
//! stops.
//!
//! | file | contents |
//! |---|---|
//! | `code` | the recovery code |
//! | `bundle` | the bundle |
//! | `keep` | the device that keeps the bundle up to date |
//! | `restore` | a new device of an account whose devices are lost |

mod bundle;
mod code;
mod keep;
mod restore;

use qpq_proto::{methods, v1};

use self::bundle::{BundleKeys, code_slot, export_slot, open};
pub use self::{
    code::{InvalidRecoveryCode, RecoveryCode},
    keep::RecoveryStatus,
};
use super::Messenger;
use crate::{client::Client, error::Error, secret::Password};

/// The outcome of [`Messenger::verify_recovery`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveryCheck {
    /// The code and the password both open the bundle.
    Opens,
    /// The password opens the bundle, the code does not.
    WrongCode,
    /// The code opens the bundle, the password does not: it was changed after the bundle was
    /// stored, and the device that stores it has not been used since.
    OldPassword,
    /// Neither opens the bundle.
    Neither,
    /// No bundle is stored.
    Absent,
}

impl Messenger {
    /// Creates a recovery code, and stores a bundle that opens with it and with the password. An
    /// earlier code opens nothing from then on.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`](crate::AuthError::WrongPassword).
    pub async fn create_recovery(&self, password: &Password) -> Result<RecoveryCode, Error> {
        let login = self.log_in_again(password).await?;
        let export_key = login.session.export_key.clone();
        login.end().await;
        let (identity, code) = (self.profile().identity, RecoveryCode::random());
        let keys = BundleKeys {
            export: export_slot(&identity, &export_key),
            code: code_slot(&identity, &code),
        };
        self.begin_keeping(keys).await?;
        Ok(code)
    }

    /// Checks the stored bundle. The server allows this ten times a day.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`](crate::AuthError::WrongPassword).
    pub async fn verify_recovery(
        &self,
        password: &Password,
        code: &RecoveryCode,
    ) -> Result<RecoveryCheck, Error> {
        let login = self.log_in_again(password).await?;
        let identity = self.profile().identity;
        let export = export_slot(&identity, &login.session.export_key);
        let fetched = fetch(&login.client).await;
        login.end().await;
        let Some(bundle) = fetched? else { return Ok(RecoveryCheck::Absent) };
        let code = code_slot(&identity, code);
        let opens = |export, code| open(&identity, export, code, &bundle.bundle).is_some();
        Ok(match (opens(Some(&export), None), opens(None, Some(&code))) {
            (true, true) => RecoveryCheck::Opens,
            (true, false) => RecoveryCheck::WrongCode,
            (false, true) => RecoveryCheck::OldPassword,
            (false, false) => RecoveryCheck::Neither,
        })
    }

    /// Removes the bundle from the server.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`](crate::AuthError::WrongPassword).
    pub async fn remove_recovery(&self, password: &Password) -> Result<(), Error> {
        let login = self.log_in_again(password).await?;
        let request = v1::DeleteRecoveryBundleRequest::default();
        let removed = login.client.call::<methods::DeleteRecoveryBundle>(request).await;
        login.end().await;
        removed?;
        self.stop_keeping().await
    }
}

/// Returns the stored bundle. The session of the client is fresh.
async fn fetch(client: &Client) -> Result<Option<v1::FetchRecoveryBundleResponse>, Error> {
    let request = v1::FetchRecoveryBundleRequest::default();
    let bundle = client.call::<methods::FetchRecoveryBundle>(request).await?;
    Ok((!bundle.bundle.is_empty()).then_some(bundle))
}
