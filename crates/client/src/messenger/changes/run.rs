//! Runs pending changes: the calls to the server, and the next step after each answer.
//!
//! A change of a group passes through these functions, each of which saves its result:
//!
//! 1. [`Messenger::change_group`] saves the change; [`Messenger::run_changes`] runs all that wait.
//! 2. `prepare` or `prepare_join` creates the commit and saves it as an [`Offer`].
//! 3. `offer` sends the commit to the server. If the server accepts it, `State::apply` applies it;
//!    if another commit was first, `State::restart_change` goes back to step 2.
//! 4. `update_members` brings the server's list of members up to date, and the change is removed.

use std::{collections::BTreeSet, time::Duration};

use qpq_domain::{ChannelId, IdentityKey, MAX_BATCH};
use qpq_mls::{Change, GroupId, GroupKind, GroupSummary};
use qpq_proto::{Status, methods, v1};
use rand::{Rng as _, rngs::OsRng};
use tokio::time::sleep;

use super::{
    Cause, Offer, Operation, PendingChange, ServerGroup,
    apply::{NO_GROUP_INFO, is_joined_later, request, statuses},
};
use crate::{
    error::{CallError, Error},
    messenger::{Messenger, groups::Role, now, send::SendOutcome, state::State},
    profile::{self, Task},
};

/// Maximum attempts at one change, if each is refused because another commit was first.
const MAX_ATTEMPTS: u32 = 8;
/// The longest pause before the second attempt, which doubles with each further attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The result of one step of a change.
enum Step {
    /// The change has a further step.
    Next,
    /// The change is complete.
    Done,
}

impl Messenger {
    /// Saves a change of a group, and runs it.
    ///
    /// Returns an error only if the change is given up. A change that is `Queued` runs with the
    /// next [`Messenger::run_changes`].
    pub(in crate::messenger) async fn change_group(
        &self,
        group: GroupId,
        change: Change,
    ) -> Result<SendOutcome, Error> {
        self.run_operation(Operation::Change { group, change, cause: Cause::Person }).await
    }

    /// Saves an operation as a pending change, and runs it.
    pub(in crate::messenger) async fn run_operation(
        &self,
        operation: Operation,
    ) -> Result<SendOutcome, Error> {
        let number = self.store().change(move |state| Ok(state.add_change(operation)?)).await?;
        match self.run_changes(Some(number)).await? {
            // The Welcomes are in the outbox.
            SendOutcome::Sent => self.send_welcomes().await,
            other => Ok(other),
        }
    }

    /// Sends the messages that an accepted commit left in the outbox. Messages that are written
    /// meanwhile, also by other processes, do not affect the outcome.
    async fn send_welcomes(&self) -> Result<SendOutcome, Error> {
        match self.flush_outbox().await {
            Ok(()) => Ok(SendOutcome::Sent),
            Err(Error::Call(reason)) => Ok(SendOutcome::Queued(Some(reason))),
            Err(error) => Err(error),
        }
    }

    /// Runs all pending changes, those of one group in their order.
    ///
    /// Returns the outcome of the change with the number `requested`. An error of another change is
    /// noted in the history.
    pub(in crate::messenger) async fn run_changes(
        &self,
        requested: Option<u64>,
    ) -> Result<SendOutcome, Error> {
        if !self.store().read(|state| Ok(state.has_changes()?)).await? {
            return Ok(SendOutcome::Sent);
        }
        let _alone = self.shared.changing.lock().await;
        let patience = self.client().options().patience;
        let turn = profile::turn(self.store().dir(), Task::ChangeGroups, patience).await?;
        let Some(_turn) = turn else { return Ok(SendOutcome::Queued(None)) };
        let (mut after, mut waiting) = (None, BTreeSet::new());
        let mut outcome = SendOutcome::Sent;
        loop {
            let next = self.store().read(move |state| Ok(state.next_change(after)?)).await?;
            let Some((number, pending)) = next else { return Ok(outcome) };
            after = Some(number);
            let lane = pending.lane();
            let is_requested = requested == Some(number);
            if waiting.contains(&lane) {
                if is_requested {
                    outcome = SendOutcome::Queued(None);
                }
                continue;
            }
            match Box::pin(self.run(number)).await {
                Ok(None) => {}
                Ok(Some(reason)) => {
                    waiting.insert(lane);
                    if is_requested {
                        outcome = SendOutcome::Queued(Some(reason));
                    } else if reason.is_unauthorized() {
                        return Err(reason.into());
                    }
                }
                // The error is not about the change, which stays pending.
                Err(error @ (Error::State(_) | Error::Profile(_))) => return Err(error),
                Err(error) => {
                    let is_shown = !is_requested && !is_joined_later(&pending, &error);
                    let reason = is_shown.then(|| error.to_string());
                    self.store().change(move |state| state.abandon_change(number, reason)).await?;
                    if is_requested {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Runs one change. Returns the error after which the change stays pending, if there was one.
    async fn run(&self, number: u64) -> Result<Option<CallError>, Error> {
        let mut is_new = false;
        loop {
            let pending = self.store().read(move |state| Ok(state.change(number)?)).await?;
            let Some(PendingChange { operation, attempts, offer }) = pending else {
                return Ok(None);
            };
            let step = match (offer, operation) {
                (Some(offer), operation) if offer.is_applied => {
                    self.update_members(number, operation, offer).await
                }
                (Some(offer), operation) => self.offer(number, operation, attempts, offer).await,
                (None, Operation::Change { group, change, .. }) => {
                    self.prepare(number, group, change).await
                }
                (None, Operation::Join { channel, known }) => {
                    self.prepare_join(number, channel, known).await
                }
                (None, Operation::Leave { channel }) => {
                    self.leave_server_group(number, channel).await
                }
            };
            match step {
                Ok(Step::Next) => {}
                Ok(Step::Done) => return Ok(None),
                Err(Error::Call(error)) if error.is_temporary() || error.is_unauthorized() => {
                    return Ok(Some(error));
                }
                // A server that was restored from a backup may not have the group.
                Err(Error::Call(error)) if error.is_code("group.not_found") && !is_new => {
                    is_new = true;
                    let forgot = move |state: &mut State| state.forget_server_group(number);
                    if !self.store().change(forgot).await? {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Creates the commit of a change, and saves it as an offer.
    async fn prepare(&self, number: u64, group: GroupId, change: Change) -> Result<Step, Error> {
        let ServerGroup { channel, epoch } = self.ensure_server_group(group).await?;
        let expected_epoch = match epoch {
            Some(epoch) => epoch,
            None => {
                let epoch = self.server_epoch(channel).await?;
                // The commits up to this epoch are in the inbox by now. A commit that is created
                // without one of them would be accepted, and refused by all members.
                let keys = self.sync_to_end().await?;
                self.settle_keys(keys).await?;
                epoch
            }
        };
        let has_commit = self
            .store()
            .change(move |state| {
                state.count_encryption()?;
                let Some(commit) = state.mls.commit(group, &change, now())? else {
                    state.remove_change(number)?;
                    return Ok(false);
                };
                let commit = qpq_mls::Commit { channel, ..commit };
                state.save_offer(number, commit, expected_epoch)?;
                Ok(true)
            })
            .await?;
        Ok(if has_commit { Step::Next } else { Step::Done })
    }

    /// Creates the external commit by which this device joins, and saves it as an offer.
    async fn prepare_join(
        &self,
        number: u64,
        channel: ChannelId,
        known: Vec<IdentityKey>,
    ) -> Result<Step, Error> {
        let request = v1::FetchGroupInfoRequest {
            channel_id: channel.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let answer = self.client().call::<methods::FetchGroupInfo>(request).await?;
        if answer.group_info.is_empty() || answer.group_info[..] == *NO_GROUP_INFO {
            return Err(Error::NoGroupInfo);
        }
        self.store()
            .change(move |state| {
                state.count_encryption()?;
                let known = known.into_iter().collect();
                let commit = state.mls.join_by_itself(&answer.group_info, &known, now())?;
                let commit = qpq_mls::Commit { channel, ..commit };
                state.save_offer(number, commit, answer.epoch)
            })
            .await?;
        Ok(Step::Next)
    }

    /// Sends the commit to the server, and applies it if it is the first for its epoch.
    async fn offer(
        &self,
        number: u64,
        operation: Operation,
        attempts: u32,
        offer: Offer,
    ) -> Result<Step, Error> {
        self.send_due_marker().await?;
        let commit = &offer.commit;
        if matches!(operation, Operation::Change { .. })
            && !commit.added.is_empty()
            && self.is_group(commit.group).await?
        {
            // New members are added before the commit, so that messages to all members reach them
            // from its epoch on.
            self.add_members(commit.channel, &commit.added, Role::Member).await?;
        }
        match self.client().call::<methods::BatchEnqueue>(request(&offer)).await {
            Ok(answer) => {
                let statuses = statuses(&offer, &answer)?;
                let pending = PendingChange { operation, attempts, offer: None };
                self.store()
                    .change(move |state| {
                        state.apply(number, pending, offer, answer.epoch, &statuses)
                    })
                    .await?;
                Ok(Step::Next)
            }
            Err(error) if error.is_code("delivery.stale_epoch") => {
                let attempts = attempts + 1;
                let pending = PendingChange { operation, attempts, offer: None };
                let group = commit.group;
                self.store()
                    .change(move |state| state.restart_change(number, &pending, group))
                    .await?;
                if attempts >= MAX_ATTEMPTS {
                    return Err(Error::GroupBusy);
                }
                let longest = FIRST_PAUSE * 2_u32.pow(attempts - 1);
                let pause = OsRng.gen_range(Duration::ZERO..=longest);
                sleep(pause).await;
                Ok(Step::Next)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Updates the server's list of members after an applied commit.
    async fn update_members(
        &self,
        number: u64,
        operation: Operation,
        offer: Offer,
    ) -> Result<Step, Error> {
        let commit = offer.commit;
        if let Operation::Change { change, .. } = operation
            && self.is_group(commit.group).await?
        {
            if !change.promote.is_empty() {
                let promoted = self.add_members(commit.channel, &change.promote, Role::Admin).await;
                promoted.or_else(|error| if is_refusal(&error) { Ok(()) } else { Err(error) })?;
            }
            for member in commit.removed {
                self.remove_member(commit.channel, member).await?;
            }
        }
        self.finish(number).await
    }

    /// Removes this account from the server's list of members of a group that it has left.
    async fn leave_server_group(&self, number: u64, channel: ChannelId) -> Result<Step, Error> {
        self.remove_member(channel, self.profile().identity).await?;
        self.finish(number).await
    }

    async fn finish(&self, number: u64) -> Result<Step, Error> {
        self.store().change(move |state| Ok(state.remove_change(number)?)).await?;
        Ok(Step::Done)
    }

    async fn add_members(
        &self,
        channel: ChannelId,
        members: &[IdentityKey],
        role: Role,
    ) -> Result<(), CallError> {
        for some in members.chunks(MAX_BATCH) {
            let request = v1::AddMembersRequest {
                channel_id: channel.as_bytes().to_vec().into(),
                member_keys: some.iter().map(|key| key.as_bytes().to_vec().into()).collect(),
                admins: role == Role::Admin,
                ..Default::default()
            };
            self.client().call::<methods::AddMembers>(request).await?;
        }
        Ok(())
    }

    /// Removes an account from the server's list of members, if it is listed and the server permits
    /// it.
    async fn remove_member(&self, channel: ChannelId, member: IdentityKey) -> Result<(), Error> {
        let request = v1::RemoveMemberRequest {
            channel_id: channel.as_bytes().to_vec().into(),
            member_key: member.as_bytes().to_vec().into(),
            ..Default::default()
        };
        match self.client().call::<methods::RemoveMember>(request).await {
            // Another member removed the account already, or this account is not an admin on the
            // server. Neither is an error: clients trust the MLS group, not the server's list of
            // members.
            Err(error) if is_refusal(&error) => Ok(()),
            answer => Ok(answer.map(drop)?),
        }
    }

    async fn is_group(&self, group: GroupId) -> Result<bool, Error> {
        let summary = self.store().read(move |state| Ok(state.mls.group(&group)?)).await?;
        Ok(summary.is_some_and(|group| matches!(group.kind, GroupKind::Group { .. })))
    }

    /// Returns the server's record of a group. Creates the record if it is not known here.
    async fn ensure_server_group(&self, id: GroupId) -> Result<ServerGroup, Error> {
        let (known, summary) = self
            .store()
            .read(move |state| Ok((state.server_group(&id)?, state.mls.group(&id)?)))
            .await?;
        if let Some(known) = known {
            return Ok(known);
        }
        let summary = summary.ok_or(Error::NoSuchConversation)?;
        let me = self.profile().identity;
        let mut request = v1::CreateChannelRequest {
            channel_id: summary.channel.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let others: Vec<_> = other_members(&summary, &me);
        match summary.peer_of(&me) {
            Some(peer) => request.peer_key = peer.as_bytes().to_vec().into(),
            None => {
                let keys = others.iter().map(|key| key.as_bytes().to_vec().into());
                request.member_keys = keys.collect();
            }
        }
        let answer = self.client().call::<methods::CreateChannel>(request).await?;
        let channel = ChannelId::try_from(&answer.channel_id[..])
            .map_err(|_| CallError::Malformed { method: "CreateChannel" })?;
        let is_admin = answer.was_new || summary.admins.contains(&me);
        if summary.peer_of(&me).is_none() && is_admin {
            // A server that was restored from a backup may have an older list.
            let added = self.add_members(channel, &others, Role::Member).await;
            added.or_else(|error| if is_refusal(&error) { Ok(()) } else { Err(error) })?;
            let admins: Vec<_> = summary.admins.iter().filter(|key| **key != me).copied().collect();
            let promoted = self.add_members(channel, &admins, Role::Admin).await;
            promoted.or_else(|error| if is_refusal(&error) { Ok(()) } else { Err(error) })?;
        }
        // No other account can have committed to a new group without further members.
        let epoch = (answer.was_new && others.is_empty()).then_some(0);
        let known = ServerGroup { channel, epoch };
        self.store().change(move |state| Ok(state.set_server_group(&id, known)?)).await?;
        Ok(known)
    }

    async fn server_epoch(&self, channel: ChannelId) -> Result<u64, Error> {
        let request = v1::ListGroupMembersRequest {
            channel_id: channel.as_bytes().to_vec().into(),
            limit: 1,
            ..Default::default()
        };
        Ok(self.client().call::<methods::ListGroupMembers>(request).await?.epoch)
    }
}

fn is_refusal(error: &CallError) -> bool {
    error.server().is_some_and(|error| matches!(error.status, Status::NotFound | Status::Forbidden))
}

fn other_members(group: &GroupSummary, me: &IdentityKey) -> Vec<IdentityKey> {
    group.members.iter().map(|member| member.identity).filter(|key| key != me).collect()
}
