//! The devices in our conversations: adding those that are missing, removing the revoked ones.
//!
//! Each device is a leaf of every group that its account is in. The directory (ResolveIdentity)
//! returns the devices of an account. Before a message is sent to a conversation, the directory is
//! asked again about some of its accounts; the member that writes next adds missing devices and
//! removes revoked ones. A device is added only with its account's statement, which every member
//! checks. A lying directory can therefore leave devices out and cannot add one.

use std::collections::BTreeSet;

use qpq_domain::{DeviceId, IdentityKey, UnixMillis, Username};
use qpq_mls::{Change, GroupId, MemberDevice, NewMember, database::DatabaseError};
use qpq_proto::{methods, v1};

use super::{
    Messenger,
    changes::{Cause, Operation},
    devices::OTHER_DEVICES,
    directory::is_not_found,
    inbox::unless_final,
    log::ConversationId,
    now,
    people::Person,
    records::Corrupt,
    state::State,
    tables::CHECKED,
};
use crate::{
    error::{CallError, Error},
    link::ConnectionEvent,
};

/// The maximum number of accounts about which the directory is asked before one message.
const MAX_ACCOUNTS: usize = 16;

impl Messenger {
    /// Fetches one KeyPackage for each device of a person.
    pub(super) async fn fetch_packages(&self, person: &Person) -> Result<Vec<NewMember>, Error> {
        let packages = self.fetch_of(person.identity, &person.username, None).await?;
        if packages.is_empty() {
            return Err(Error::NoKeys(person.username.clone()));
        }
        Ok(packages)
    }

    /// Fetches one KeyPackage for each other device of this account.
    pub(super) async fn fetch_own_packages(&self) -> Result<Vec<NewMember>, Error> {
        if !self.store().read(|state| Ok(state.has_other_devices()?)).await? {
            return Ok(Vec::new());
        }
        let Some(own) = self.device_id().await? else { return Ok(Vec::new()) };
        let (me, username) = (self.profile().identity, &self.profile().username);
        self.fetch_of(me, username, Some(own)).await
    }

    async fn fetch_of(
        &self,
        identity: IdentityKey,
        username: &Username,
        except: Option<DeviceId>,
    ) -> Result<Vec<NewMember>, Error> {
        let request = v1::FetchKeyPackageRequest {
            identity_key: identity.as_bytes().to_vec().into(),
            all_devices: true,
            ..Default::default()
        };
        let answer = match self.client().call::<methods::FetchKeyPackage>(request).await {
            Ok(answer) => answer,
            Err(error) if is_not_found(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let is_wanted = |package: &v1::DevicePackage| {
            let id = DeviceId::try_from(&package.device_id[..]).ok();
            !package.package.is_empty() && (except.is_none() || id != except)
        };
        let of_devices = answer.packages.into_iter().filter(is_wanted);
        let packages = of_devices.map(|one| one.package).chain(Some(answer.package));
        Ok(packages
            .filter(|package| !package.is_empty())
            .map(|package| NewMember {
                identity,
                username: username.clone(),
                key_package: package.to_vec(),
            })
            .collect())
    }

    /// Brings a conversation's devices up to date, before something is sent to it.
    ///
    /// Asks the directory about the accounts whose last answer is the oldest. A failure of the
    /// server does not delay the message.
    pub(super) async fn update_devices(&self, conversation: ConversationId) -> Result<(), Error> {
        let is_connected = matches!(
            *self.client().connection_events().borrow(),
            ConnectionEvent::Connected { .. }
        );
        if !is_connected {
            return Ok(());
        }
        let stale_after = self.client().options().devices_every;
        let due = self
            .store()
            .read(move |state| {
                let Some(group) = state.group_of(conversation)? else { return Ok(None) };
                let Some(summary) = state.mls.group(&group)?.filter(|group| group.active) else {
                    return Ok(None);
                };
                let is_recent = |at: UnixMillis| at <= now() && at.plus(stale_after) > now();
                // For a large group one row is enough, unless some of its accounts are due.
                if state.checked_at(group.as_bytes())?.is_some_and(is_recent) {
                    return Ok(None);
                }
                let mut due = Vec::new();
                for member in summary.members {
                    let checked = state.checked_at(member.identity.as_bytes())?;
                    if !checked.is_some_and(is_recent) {
                        due.push((checked, member.identity));
                    }
                }
                due.sort_unstable();
                let are_all = due.len() <= MAX_ACCOUNTS;
                due.truncate(MAX_ACCOUNTS);
                let due: Vec<_> = due.into_iter().map(|(_, identity)| identity).collect();
                Ok(Some((group, due, are_all)))
            })
            .await?;
        let Some((group, due, are_all)) = due else { return Ok(()) };
        if are_all {
            self.store().change(move |state| Ok(state.set_checked(group.as_bytes())?)).await?;
        }
        if due.is_empty() {
            return Ok(());
        }
        match self.reconcile(group, &due).await {
            Err(Error::Call(error)) if error.is_temporary() => {
                tracing::debug!(%error, "devices not checked, retrying later");
                Ok(())
            }
            Err(error @ (Error::Mls(_) | Error::GroupBusy)) => {
                tracing::warn!(%error, "devices of a conversation cannot be brought up to date");
                Ok(())
            }
            done => unless_final("devices", done),
        }
    }

    /// Brings this account's own devices up to date in every group.
    pub(super) async fn update_own_devices(&self) -> Result<(), Error> {
        self.devices().await?;
        let me = self.profile().identity;
        let groups = self.store().read(|state| Ok(state.mls.groups()?)).await?;
        for group in groups.into_iter().filter(|group| group.active) {
            match self.reconcile(group.id, &[me]).await {
                Err(error @ (Error::Mls(_) | Error::GroupBusy)) => {
                    tracing::warn!(%error, "own devices cannot be brought up to date in a group");
                }
                done => unless_final("devices", done)?,
            }
        }
        Ok(())
    }

    /// Adds the missing devices of accounts to a group, and removes the revoked ones.
    async fn reconcile(&self, group: GroupId, accounts: &[IdentityKey]) -> Result<(), Error> {
        let mut change = Change::default();
        let devices = self.store().change(move |state| Ok(state.mls.devices(&group)?)).await?;
        let me = self.profile().identity;
        for account in accounts {
            let Some(registered) = self.registered_devices(account).await? else { continue };
            if *account == me {
                let others = registered.len().saturating_sub(1) as u64;
                self.store()
                    .change(move |state| Ok(state.set_number(OTHER_DEVICES, Some(others))?))
                    .await?;
            }
            let of_account: Vec<_> =
                devices.iter().filter(|device| device.member.identity == *account).collect();
            let Some(username) = of_account.first().map(|device| &device.member.username) else {
                continue;
            };
            change.remove_devices.extend(revoked(&of_account, &registered));
            let present: BTreeSet<_> = of_account.iter().filter_map(|device| device.id()).collect();
            // A leaf without a device is from before the account had devices, and counts as its
            // first one.
            let unnamed = of_account.iter().filter(|device| device.id().is_none()).count();
            let missing = registered.difference(&present).count();
            if missing > unnamed {
                let own = self.device_id().await?.filter(|_| *account == me);
                let packages = self.fetch_of(*account, username, own).await?;
                change.add.extend(packages);
            }
            let account = *account;
            self.store().change(move |state| Ok(state.set_checked(account.as_bytes())?)).await?;
        }
        let is_changed = !change.add.is_empty() || !change.remove_devices.is_empty();
        if is_changed {
            self.run_operation(Operation::Change { group, change, cause: Cause::Client }).await?;
        }
        Ok(())
    }

    /// Returns the ids of an account's devices, by the directory.
    async fn registered_devices(
        &self,
        account: &IdentityKey,
    ) -> Result<Option<BTreeSet<DeviceId>>, Error> {
        let request = v1::ResolveIdentityRequest {
            identity_key: account.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let answer = match self.client().call::<methods::ResolveIdentity>(request).await {
            Ok(answer) => answer,
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let ids = answer.devices.iter().map(|device| DeviceId::try_from(&device.device_id[..]));
        let ids: Result<_, _> = ids.collect();
        Ok(Some(ids.map_err(|_| CallError::Malformed { method: "ResolveIdentity" })?))
    }
}

/// Returns the devices of a group that an account has revoked.
///
/// The last device of an account stays, since its removal would remove the account.
fn revoked(
    of_account: &[&MemberDevice],
    registered: &BTreeSet<DeviceId>,
) -> Vec<(IdentityKey, Option<DeviceId>)> {
    let is_revoked = |device: &&&MemberDevice| {
        device.id().is_some_and(|id| !registered.is_empty() && !registered.contains(&id))
    };
    let revoked: Vec<_> = of_account
        .iter()
        .filter(is_revoked)
        .map(|device| (device.member.identity, device.id()))
        .collect();
    if revoked.len() == of_account.len() { Vec::new() } else { revoked }
}

impl State {
    /// Returns the MLS group to send to in a conversation.
    pub(super) fn group_of(
        &self,
        conversation: ConversationId,
    ) -> Result<Option<GroupId>, DatabaseError> {
        match conversation {
            ConversationId::Direct(peer) => self.mls.direct(&peer),
            ConversationId::Group(id) => Ok(Some(id)),
        }
    }

    /// Returns the time at which the devices of an account, or of all accounts of a group, were
    /// last requested.
    fn checked_at(&self, subject: &[u8; 32]) -> Result<Option<UnixMillis>, DatabaseError> {
        let row = self.database().get(CHECKED, subject)?;
        let at = row.map(|row| row[..].try_into().map(u64::from_be_bytes)).transpose();
        Ok(at.map_err(Corrupt::new)?.map(UnixMillis))
    }

    fn set_checked(&self, subject: &[u8; 32]) -> Result<(), DatabaseError> {
        self.database().put(CHECKED, subject, None, &now().0.to_be_bytes())
    }
}
