//! Processing of received messages. No input causes a panic or a loss of state.
//!
//! A message is identified by the SHA-256 of its bytes. If it was processed before, it is a
//! [`Received::Duplicate`]; otherwise, if it cannot be decrypted, it is [`Received::Unreadable`].

use std::collections::BTreeSet;

use openmls::prelude::{
    ContentType, MlsMessageBodyIn, MlsMessageIn, ProtocolMessage, PublicMessageIn, Sender, Welcome,
};
use qpq_domain::{ChannelId, IdentityKey, UnixMillis};
use sha2::{Digest as _, Sha256};
use tls_codec::DeserializeBytes as _;

use crate::{
    client::Client,
    database::DatabaseError,
    group::{Group, MessageEffect},
    identity::Member,
    invitation::Invitation,
    outline, packages, passes,
    profile::GroupId,
    received::{Arrival, Ignored, Lost, Received, Rules, Unreadable},
    requests,
    summary::GroupSummary,
    tables,
    waiting::{self, Needs, WaitingMessage},
};

/// The first bytes of the server's request that all members renew their keys.
const ROTATION_REQUEST: &[u8] = b"QPQR";

/// Returns the day of a time. Digests are kept by day.
pub(crate) fn day(at: UnixMillis) -> u64 {
    at.0 / (24 * 3600 * 1000)
}

impl Client {
    /// Processes one message of any sender. Joins the group if the message is a Welcome.
    ///
    /// The first result is about the message. Further ones are about messages that waited for it,
    /// or that it displaced.
    ///
    /// See the crate's documentation on saving before acknowledging.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        arrival: Arrival,
    ) -> Result<Vec<Received>, DatabaseError> {
        let rules =
            Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(true), has_other_devices: false };
        self.receive_by(bytes, arrival, &rules)
    }

    /// Processes one message as [`Client::receive`] does, under rules about people.
    pub fn receive_by(
        &mut self,
        bytes: &[u8],
        arrival: Arrival,
        rules: &Rules<'_>,
    ) -> Result<Vec<Received>, DatabaseError> {
        if !self.database.note_digest(&Sha256::digest(bytes).into(), day(arrival.at))? {
            return Ok(vec![Received::Duplicate]);
        }
        if bytes.starts_with(ROTATION_REQUEST) {
            return Ok(vec![Received::RotationRequested { channel: arrival.channel }]);
        }
        let Ok(message) = MlsMessageIn::tls_deserialize_exact_bytes(bytes) else {
            return Ok(vec![Received::Ignored(Ignored::NotMls)]);
        };
        match message.extract() {
            MlsMessageBodyIn::Welcome(welcome) => {
                self.receive_welcome(welcome, bytes, arrival, rules)
            }
            body => match to_group(body) {
                Some(message) => self.receive_to_group(message, bytes, arrival, rules.blocked),
                None => Ok(vec![Received::Ignored(Ignored::NotMls)]),
            },
        }
    }

    /// Notes a message that is not for MLS, so that [`Client::knows`] recognizes it.
    pub fn note_received(&mut self, bytes: &[u8], at: UnixMillis) -> Result<(), DatabaseError> {
        self.database.note_digest(&Sha256::digest(bytes).into(), day(at)).map(drop)
    }

    /// Returns whether a message was received before, by the SHA-256 of its bytes.
    pub fn knows(&self, digest: &[u8; 32]) -> Result<bool, DatabaseError> {
        self.database.knows_digest(digest)
    }

    /// Forgets up to `limit` of the messages that arrived on a day before the day of `before`;
    /// returns their number. A forgotten message that arrives again is not recognized.
    pub fn forget_received(&self, before: UnixMillis, limit: u32) -> Result<usize, DatabaseError> {
        self.database.forget_digests(day(before), limit)
    }

    /// Removes the messages that have waited too long, and returns them as lost. Messages to groups
    /// from which this device was removed are not returned: they were not for this device.
    pub fn remove_expired_waiting(
        &mut self,
        now: UnixMillis,
    ) -> Result<Vec<Unreadable>, DatabaseError> {
        let over = waiting::remove_if(&self.database, |message| {
            message.arrival.at.plus(waiting::RETENTION) <= now
        })?;
        let mut lost = Vec::new();
        for message in over {
            if self.group(&message.group)?.is_none_or(|group| group.active) {
                lost.push(message.into_unreadable(Lost::NeverCame));
            }
        }
        Ok(lost)
    }

    /// Removes the messages of unknown groups that satisfy `is_over`, and returns them as lost.
    pub fn remove_waiting_if(
        &mut self,
        is_over: impl Fn(&Unreadable) -> bool,
    ) -> Result<Vec<Unreadable>, DatabaseError> {
        let over = waiting::remove_if(&self.database, |message| {
            message.needs == Needs::Welcome
                && is_over(&message.clone().into_unreadable(Lost::NeverCame))
        })?;
        Ok(over.into_iter().map(|message| message.into_unreadable(Lost::NeverCame)).collect())
    }

    /// Returns the groups of which messages wait for a commit.
    pub fn behind(&self) -> Result<Vec<GroupId>, DatabaseError> {
        let waiting = waiting::groups(&self.database, Needs::Commit)?;
        Ok(waiting.into_keys().collect())
    }

    /// Returns the channels of messages to unknown groups, which wait for a Welcome.
    pub fn unknown_channels(&self) -> Result<Vec<ChannelId>, DatabaseError> {
        let mut channels = Vec::new();
        for (group, channel) in waiting::groups(&self.database, Needs::Welcome)? {
            if self.group(&group)?.is_none() {
                channels.push(channel);
            }
        }
        channels.sort_unstable();
        channels.dedup();
        Ok(channels)
    }

    fn receive_to_group(
        &mut self,
        message: ProtocolMessage,
        bytes: &[u8],
        arrival: Arrival,
        blocked: &BTreeSet<IdentityKey>,
    ) -> Result<Vec<Received>, DatabaseError> {
        let Ok(id) = GroupId::try_from(message.group_id().as_slice()) else {
            return Ok(vec![Received::Ignored(Ignored::NotMls)]);
        };
        let epoch = message.epoch().as_u64();
        let needs = match self.group(&id)? {
            None => Some(Needs::Welcome),
            Some(group) if epoch > group.epoch && group.active => Some(Needs::Commit),
            // This device was removed, and may have been added again in that epoch.
            Some(group) if epoch > group.epoch => Some(Needs::Welcome),
            Some(_) => None,
        };
        if let Some(needs) = needs {
            if needs == Needs::Welcome && self.is_refused(&id, bytes, blocked)? {
                return Ok(vec![Received::Refused { used_package: false }]);
            }
            let message =
                WaitingMessage { group: id, epoch, needs, arrival, bytes: bytes.to_vec() };
            if needs == Needs::Welcome && requests::waits(&self.database, &id)? {
                requests::keep_message(&self.database, &message)?;
                return Ok(vec![Received::Buffered]);
            }
            let displaced = waiting::add(&self.database, &message)?;
            let displaced = displaced
                .into_iter()
                .map(|message| Received::Unreadable(message.into_unreadable(Lost::Displaced)));
            return Ok(std::iter::once(Received::Buffered).chain(displaced).collect());
        }
        let is_text = message.content_type() == ContentType::Application;
        let mut first = self.process(id, message, bytes, arrival)?;
        if is_text
            && first == Received::Ignored(Ignored::BeforeJoining)
            && !self.expects_earlier(id)?
        {
            first = Received::Unreadable(unreadable(bytes, Some(id), Lost::NoKeys, arrival));
        }
        let mut results = vec![first];
        if matches!(results[0], Received::Committed { .. }) {
            self.retry(id, &mut results)?;
        }
        Ok(results)
    }

    /// Returns whether messages of epochs before this device joined a group are expected.
    ///
    /// A Welcome follows them in the inbox. After an external commit they may be unread until the
    /// inbox was read to its end.
    fn expects_earlier(&mut self, id: GroupId) -> Result<bool, DatabaseError> {
        let Some(joined_at) = self.joined_at(&id)? else { return Ok(false) };
        passes::is_unpassed(&self.database, &id, joined_at.saturating_sub(1))
    }

    /// Returns whether a message to a group that is unknown here has no effect.
    fn is_refused(
        &self,
        id: &GroupId,
        bytes: &[u8],
        blocked: &BTreeSet<IdentityKey>,
    ) -> Result<bool, DatabaseError> {
        Ok(blocked.iter().any(|key| id.is_created_by(key))
            || outline::claimed_sender(bytes).is_some_and(|sender| blocked.contains(&sender))
            || self.database.get(tables::LEFT, id.as_bytes())?.is_some()
            || requests::was_declined(&self.database, id)?)
    }

    fn receive_welcome(
        &mut self,
        welcome: Welcome,
        bytes: &[u8],
        arrival: Arrival,
        rules: &Rules<'_>,
    ) -> Result<Vec<Received>, DatabaseError> {
        let Some(package) = packages::addressed_by(&self.database, &welcome)? else {
            if rules.has_other_devices && !packages::was_used(&self.database, &welcome)? {
                return Ok(vec![Received::Ignored(Ignored::ForAnotherDevice)]);
            }
            let lost = unreadable(bytes, None, Lost::NoPackage, arrival);
            return Ok(vec![Received::Unreadable(lost)]);
        };
        let invitation = match Invitation::open(&package, welcome, &self.identity.public()) {
            Ok(invitation) => invitation,
            Err(reason) => return Ok(vec![Received::Ignored(reason)]),
        };
        let request = invitation.request(arrival);
        let id = request.group;
        if rules.blocked.contains(&request.inviter.identity) {
            packages::used(&self.database, &package, rules.has_other_devices)?;
            waiting::remove_group(&self.database, &id)?;
            return Ok(vec![Received::Refused { used_package: true }]);
        }
        let present = self.group(&id)?;
        let joins = present.is_some() || (rules.joins)(&request)?;
        // The Welcome of the later epoch counts. The waiting request of a stranger does not
        // displace a Welcome that is joined immediately: it may be for another group of the same
        // id.
        let known = present.as_ref().map(|group| group.epoch);
        let waits = requests::get(&self.database, &id)?.map(|kept| kept.request.epoch);
        let newest = if joins { known } else { known.max(waits) };
        if newest.is_some_and(|epoch| epoch >= request.epoch) {
            return Ok(vec![Received::Duplicate]);
        }
        // A Welcome replaces the state of a group that we are in. Its own content proves only that
        // its sender may invite to some group of this id, and anybody can create such a group.
        let inviter = request.inviter.identity;
        let may_replace = |group: &GroupSummary| {
            !group.active || group.admins.contains(&inviter) || inviter == self.identity.public()
        };
        if !present.as_ref().is_none_or(may_replace) {
            return Ok(vec![Received::Ignored(Ignored::BadWelcome)]);
        }
        if !joins {
            packages::used(&self.database, &package, rules.has_other_devices)?;
            requests::keep(&self.database, &request, &package, bytes)?;
            for message in waiting::remove_group(&self.database, &id)? {
                requests::keep_message(&self.database, &message)?;
            }
            return Ok(vec![Received::Requested(request)]);
        }
        let group = match invitation.join() {
            Ok(group) => group,
            Err(reason) => return Ok(vec![Received::Ignored(reason)]),
        };
        packages::used(&self.database, &package, rules.has_other_devices)?;
        self.join(group, Some(request.inviter))
    }

    /// Joins the group of a request; `None` if there is none. The results are those of a Welcome
    /// that is received.
    pub fn accept(&mut self, id: &GroupId) -> Result<Option<Vec<Received>>, DatabaseError> {
        let Some(kept) = requests::get(&self.database, id)? else { return Ok(None) };
        let message = MlsMessageIn::tls_deserialize_exact_bytes(&kept.welcome);
        let Ok(MlsMessageBodyIn::Welcome(welcome)) = message.map(MlsMessageIn::extract) else {
            return Err(DatabaseError::Damaged("the Welcome of a request is cut short".into()));
        };
        let me = self.identity.public();
        match Invitation::open(&kept.package, welcome, &me).and_then(Invitation::join) {
            Ok(group) => self.join(group, Some(kept.request.inviter)).map(Some),
            Err(reason) => {
                requests::decline(&self.database, id)?;
                Ok(Some(vec![Received::Ignored(reason)]))
            }
        }
    }

    /// Adds a joined group, and processes the messages that waited for it.
    ///
    /// `by` is the inviter; `None` if this device joined by an external commit.
    pub(crate) fn join(
        &mut self,
        group: Group,
        by: Option<Member>,
    ) -> Result<Vec<Received>, DatabaseError> {
        let id = group.id();
        let itself =
            || Member { identity: self.identity.public(), username: self.username.clone() };
        let by = by.unwrap_or_else(itself);
        let mut results = vec![Received::Joined { group: group.summary(), by }];
        self.database.delete(tables::LEFT, id.as_bytes())?;
        // Deletes the keys of the replaced state.
        Group::delete(&self.database, id)?;
        self.insert(group);
        let mut messages = requests::accepted(&self.database, &id)?;
        messages.sort_by_key(|message| message.epoch);
        for message in messages {
            self.retry_one(id, message, &mut results)?;
        }
        self.retry(id, &mut results)?;
        Ok(results)
    }

    /// Processes a message that waited with a request, or lets it wait for its commit.
    fn retry_one(
        &mut self,
        id: GroupId,
        message: WaitingMessage,
        results: &mut Vec<Received>,
    ) -> Result<(), DatabaseError> {
        let Some(group) = self.group(&id)? else {
            // According to an earlier message, this account has left.
            results.push(Received::Refused { used_package: false });
            return Ok(());
        };
        if message.epoch > group.epoch {
            let message = WaitingMessage { needs: Needs::Commit, ..message };
            let displaced = waiting::add(&self.database, &message)?;
            results.extend(
                displaced
                    .into_iter()
                    .map(|one| Received::Unreadable(one.into_unreadable(Lost::Displaced))),
            );
            return Ok(());
        }
        let WaitingMessage { bytes, arrival, .. } = message;
        let parsed = MlsMessageIn::tls_deserialize_exact_bytes(&bytes).map(MlsMessageIn::extract);
        if let Some(message) = parsed.ok().and_then(to_group) {
            results.push(self.process(id, message, &bytes, arrival)?);
        }
        Ok(())
    }

    /// Processes the messages that waited for the present epoch of a group, and for those that
    /// follow.
    pub(crate) fn retry(
        &mut self,
        id: GroupId,
        results: &mut Vec<Received>,
    ) -> Result<(), DatabaseError> {
        while let Some(epoch) = self.group(&id)?.map(|group| group.epoch) {
            let ready = waiting::release(&self.database, &id, epoch)?;
            if ready.is_empty() {
                break;
            }
            for message in ready {
                self.retry_one(id, message, results)?;
            }
        }
        Ok(())
    }

    fn process(
        &mut self,
        id: GroupId,
        message: ProtocolMessage,
        bytes: &[u8],
        arrival: Arrival,
    ) -> Result<Received, DatabaseError> {
        let group = self.load(id)?.expect("the callers looked it up");
        Ok(match group.process(message) {
            MessageEffect::Lost(reason) => {
                Received::Unreadable(unreadable(bytes, Some(id), reason, arrival))
            }
            MessageEffect::TooLate { sender } => Received::Unreadable(Unreadable {
                claimed_sender: Some(sender.identity),
                ..unreadable(bytes, Some(id), Lost::NotAMember, arrival)
            }),
            effect => {
                let me = self.identity.public();
                let is_over = matches!(&effect, MessageEffect::Leaving { sender }
                    if sender.identity == me);
                let result = self.result(id, effect);
                if is_over {
                    self.forget_left(&id)?;
                }
                result
            }
        })
    }

    pub(crate) fn result(&self, id: GroupId, effect: MessageEffect) -> Received {
        match effect {
            MessageEffect::Message { sender, content } => {
                let channel = self.groups[&id].profile().channel;
                Received::Message { group: id, channel, sender, content }
            }
            MessageEffect::Asked { sender, digests } => {
                Received::Asked { group: id, sender, digests }
            }
            MessageEffect::Leaving { sender } => Received::Leaving { group: id, sender },
            MessageEffect::Committed { by, changes } => {
                Received::Committed { group: id, by, changes }
            }
            MessageEffect::Lost(_) | MessageEffect::TooLate { .. } => {
                unreachable!("it needs the message")
            }
            MessageEffect::Ignored(reason) => Received::Ignored(reason),
        }
    }
}

/// Returns a message to a group: a PrivateMessage or, as the only PublicMessage, an external
/// commit.
fn to_group(body: MlsMessageBodyIn) -> Option<ProtocolMessage> {
    let is_join = |message: &PublicMessageIn| {
        matches!(message.sender(), Sender::NewMemberCommit)
            && message.content_type() == ContentType::Commit
    };
    match body {
        MlsMessageBodyIn::PrivateMessage(message) => Some(message.into()),
        MlsMessageBodyIn::PublicMessage(message) => is_join(&message).then(|| message.into()),
        _ => None,
    }
}

impl WaitingMessage {
    fn into_unreadable(self, reason: Lost) -> Unreadable {
        unreadable(&self.bytes, Some(self.group), reason, self.arrival)
    }
}

fn unreadable(bytes: &[u8], group: Option<GroupId>, reason: Lost, arrival: Arrival) -> Unreadable {
    Unreadable {
        reason,
        digest: Sha256::digest(bytes).into(),
        group,
        claimed_sender: outline::claimed_sender(bytes),
        arrival,
    }
}
