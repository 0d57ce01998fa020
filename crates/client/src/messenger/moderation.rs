//! Bans of groups. The removal of a banned member from the MLS group is a commit; the ban keeps the
//! account from being added again, and from sending to all members.

use qpq_domain::{IdentityKey, UnixMillis};
use qpq_proto::{methods, v1};

use super::{Messenger, changes::ServerGroup, log::ConversationId, people::Person, send::group_of};
use crate::error::{CallError, Error};

/// A ban of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupBan {
    /// The banned account.
    pub person: Person,
    /// The reason, which admins of the group and the server can read.
    pub reason: String,
    /// The time of the ban.
    pub banned_at: UnixMillis,
    /// The end; `None` for a permanent ban.
    pub expires_at: Option<UnixMillis>,
}

impl Messenger {
    /// Bans an account from a group that we are an admin of, for a number of seconds; `None` for a
    /// permanent ban.
    ///
    /// The server removes the account from its list of members, and refuses its messages to all
    /// members. The account stays in the MLS group until [`Messenger::remove`].
    pub async fn ban_from_group(
        &self,
        group: ConversationId,
        identity: IdentityKey,
        reason: &str,
        seconds: Option<u64>,
    ) -> Result<(), Error> {
        let request = v1::BanUserRequest {
            identity_key: identity.as_bytes().to_vec().into(),
            reason: reason.to_owned(),
            duration_secs: seconds.unwrap_or(0),
            channel_id: self.channel_of(group).await?,
            ..Default::default()
        };
        self.client().call::<methods::BanUser>(request).await?;
        Ok(())
    }

    /// Ends the ban of an account from a group that we are an admin of. Does nothing if the account
    /// is not banned.
    pub async fn unban_from_group(
        &self,
        group: ConversationId,
        identity: IdentityKey,
    ) -> Result<(), Error> {
        let request = v1::UnbanUserRequest {
            identity_key: identity.as_bytes().to_vec().into(),
            channel_id: self.channel_of(group).await?,
            ..Default::default()
        };
        self.client().call::<methods::UnbanUser>(request).await?;
        Ok(())
    }

    /// Returns the bans in force of a group that we are an admin of, newest first.
    pub async fn group_bans(&self, group: ConversationId) -> Result<Vec<GroupBan>, Error> {
        let channel_id = self.channel_of(group).await?;
        let request = v1::ListBannedRequest { channel_id, ..Default::default() };
        let users = self.client().call::<methods::ListBanned>(request).await?.users;
        let malformed = |_| CallError::Malformed { method: "ListBanned" };
        let keys: Vec<_> = users
            .iter()
            .map(|user| IdentityKey::try_from(&user.identity_key[..]).map_err(malformed))
            .collect::<Result<_, _>>()?;
        let people = self
            .store()
            .read(move |state| keys.iter().map(|key| Ok(state.people.person(key)?)).collect())
            .await?;
        let people: Vec<Person> = people;
        let at = |seconds: u64| UnixMillis(seconds.saturating_mul(1_000));
        let bans = people.into_iter().zip(users).map(|(person, user)| GroupBan {
            person,
            reason: user.reason,
            banned_at: at(user.banned_at),
            expires_at: (user.expires_at != 0).then(|| at(user.expires_at)),
        });
        Ok(bans.collect())
    }

    /// Returns the channel of a group, in the form that requests have.
    async fn channel_of(&self, group: ConversationId) -> Result<bytes::Bytes, Error> {
        let id = group_of(group)?;
        let channel = self
            .store()
            .read(move |state| match state.server_group(&id)? {
                Some(ServerGroup { channel, .. }) => Ok(channel),
                None => Ok(state.mls.group(&id)?.ok_or(Error::NoSuchConversation)?.channel),
            })
            .await?;
        Ok(channel.as_bytes().to_vec().into())
    }
}
