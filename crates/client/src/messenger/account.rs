//! The account as a whole: its deletion, and the people that this device knows.

use std::time::Duration;

use qpq_proto::{methods, v1};
use tokio::time::timeout;

use super::{ConversationKind, Membership, Messenger, Person};
use crate::{
    error::{AuthError, Error},
    secret::Password,
};

/// The maximum time to leave the groups before the account is deleted. The login that precedes it
/// counts as fresh for longer.
const LEAVING: Duration = Duration::from_secs(60);

impl Messenger {
    /// Returns everyone that this device knows: the people of all conversations and requests, and
    /// those whose names were looked up.
    pub async fn people(&self) -> Result<Vec<Person>, Error> {
        self.store()
            .read(|state| {
                let keys = state.people.everyone()?;
                keys.iter().map(|key| Ok(state.people.person(key)?)).collect()
            })
            .await
    }

    /// Deletes the account on the server permanently. The profile stays on disk.
    ///
    /// Leaves the groups first, as far as that is possible within a minute, so that the other
    /// members see that this account has left. A group that could not be left is left by the
    /// server, and keeps the account as a member of its MLS group until an admin removes it.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`], before anything has changed, and the errors of calls to the
    /// server. After such an error, the account may be deleted or not; another call finds out.
    pub async fn delete_account(&self, password: &Password) -> Result<(), Error> {
        let username = self.profile().username.clone();
        self.client().login(&username, password).await?;
        if timeout(LEAVING, Box::pin(self.leave_all())).await.is_err() {
            tracing::debug!("not every group was left in time");
        }
        let request = v1::DeleteAccountRequest::default();
        match self.client().call::<methods::DeleteAccount>(request).await {
            Ok(_) => {}
            // The answer to an earlier attempt was lost, or another device ended the sessions.
            Err(error) if error.is_unauthorized() => {
                match self.client().login(&username, password).await {
                    Err(AuthError::WrongPassword) => {}
                    Ok(_) => return Err(error.into()),
                    Err(failed) => return Err(failed.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.client().set_session(None);
        Ok(())
    }

    /// Leaves every group, and skips those that cannot be left.
    async fn leave_all(&self) {
        let Ok(conversations) = self.conversations().await else { return };
        for conversation in conversations {
            let ConversationKind::Group { membership: Membership::Member, .. } = conversation.kind
            else {
                continue;
            };
            if let Err(error) = Box::pin(self.leave(conversation.id)).await {
                tracing::debug!(%error, "a group was not left before the account was deleted");
            }
        }
    }
}
