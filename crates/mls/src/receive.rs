//! What a client does with bytes that it receives. Whatever they are, it neither panics nor loses
//! what it had.
//!
//! A message is known by the SHA-256 of its bytes. One that was processed before is a
//! [`Received::Duplicate`]; one that was not, and cannot be decrypted, is
//! [`Received::Unreadable`]: the two are never confused.

use std::collections::BTreeSet;

use openmls::prelude::{MlsMessageBodyIn, MlsMessageIn, PrivateMessageIn, Welcome};
use qpq_domain::{IdentityKey, UnixMillis};
use sha2::{Digest as _, Sha256};
use tls_codec::DeserializeBytes as _;

use crate::{
    client::Client,
    database::DatabaseError,
    group::{Group, MessageEffect},
    invitation::Invitation,
    outline, packages,
    profile::GroupId,
    received::{Arrival, Ignored, Lost, Received, Rules, Unreadable},
    requests, tables,
    waiting::{self, Needs, PutAside},
};

/// The day of a time, by which digests are kept.
pub(crate) fn day(at: UnixMillis) -> u64 {
    at.0 / (24 * 3600 * 1000)
}

impl Client {
    /// Takes in one message of anybody, and joins each group that it is a Welcome to. The first
    /// result is about the message; further ones are about messages that waited for it, or that it
    /// displaced.
    ///
    /// See the crate's documentation on saving before acknowledging.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        arrival: Arrival,
    ) -> Result<Vec<Received>, DatabaseError> {
        let rules = Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(true) };
        self.receive_by(bytes, arrival, &rules)
    }

    /// Takes in one message as [`Client::receive`] does, by rules about people.
    pub fn receive_by(
        &mut self,
        bytes: &[u8],
        arrival: Arrival,
        rules: &Rules<'_>,
    ) -> Result<Vec<Received>, DatabaseError> {
        if !self.database.note_digest(&Sha256::digest(bytes).into(), day(arrival.at))? {
            return Ok(vec![Received::Duplicate]);
        }
        let Ok(message) = MlsMessageIn::tls_deserialize_exact_bytes(bytes) else {
            return Ok(vec![Received::Ignored(Ignored::NotMls)]);
        };
        match message.extract() {
            MlsMessageBodyIn::PrivateMessage(message) => {
                self.receive_private(message, bytes, arrival, rules.blocked)
            }
            MlsMessageBodyIn::Welcome(welcome) => {
                self.receive_welcome(welcome, bytes, arrival, rules)
            }
            // Everything else travels in the open, where our groups say nothing; an external commit
            // above all.
            _ => Ok(vec![Received::Ignored(Ignored::NotMls)]),
        }
    }

    /// Whether a message was received before, by the SHA-256 of its bytes.
    pub fn knows(&self, digest: &[u8; 32]) -> Result<bool, DatabaseError> {
        self.database.knows_digest(digest)
    }

    /// Forgets up to `limit` of the messages that arrived on a day before the day of `before`;
    /// returns how many. A message that is forgotten and arrives again is not recognized.
    pub fn forget_received(&self, before: UnixMillis, limit: u32) -> Result<usize, DatabaseError> {
        self.database.forget_digests(day(before), limit)
    }

    /// Gives up on the messages that have waited for what they need since before `now` for longer
    /// than it can still come.
    pub fn give_up_waiting(&mut self, now: UnixMillis) -> Result<Vec<Unreadable>, DatabaseError> {
        let over = waiting::remove_if(&self.database, |message| {
            message.arrival.at.plus(waiting::RETENTION) <= now
        })?;
        Ok(over.into_iter().map(|message| message.give_up(Lost::NeverCame)).collect())
    }

    /// Gives up on the messages of unknown groups that `is_over` says wait in vain.
    pub fn give_up_on(
        &mut self,
        is_over: impl Fn(&Unreadable) -> bool,
    ) -> Result<Vec<Unreadable>, DatabaseError> {
        let over = waiting::remove_if(&self.database, |message| {
            message.needs == Needs::Welcome && is_over(&message.clone().give_up(Lost::NeverCame))
        })?;
        Ok(over.into_iter().map(|message| message.give_up(Lost::NeverCame)).collect())
    }

    fn receive_private(
        &mut self,
        message: PrivateMessageIn,
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
            Some(group) if group.active && epoch > group.epoch => Some(Needs::Commit),
            Some(_) => None,
        };
        if let Some(needs) = needs {
            if needs == Needs::Welcome && self.is_refused(&id, bytes, blocked)? {
                return Ok(vec![Received::Refused { used_package: false }]);
            }
            let message = PutAside { group: id, epoch, needs, arrival, bytes: bytes.to_vec() };
            if needs == Needs::Welcome && requests::waits(&self.database, &id)? {
                requests::hold(&self.database, &message)?;
                return Ok(vec![Received::Buffered]);
            }
            let displaced = waiting::put_aside(&self.database, &message)?;
            let displaced = displaced
                .into_iter()
                .map(|message| Received::Unreadable(message.give_up(Lost::Displaced)));
            return Ok(std::iter::once(Received::Buffered).chain(displaced).collect());
        }
        let first = self.process(id, message, bytes, arrival)?;
        let mut results = vec![first];
        if matches!(results[0], Received::Committed { .. }) {
            self.retry(id, &mut results)?;
        }
        Ok(results)
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
            let lost = unreadable(bytes, None, Lost::NoPackage, arrival);
            return Ok(vec![Received::Unreadable(lost)]);
        };
        let invitation = match Invitation::open(&package, welcome, &self.identity.public()) {
            Ok(invitation) => invitation,
            Err(reason) => return Ok(vec![Received::Ignored(reason)]),
        };
        let request = invitation.request(arrival);
        let id = request.group;
        if rules.blocked.contains(&request.creator.identity) {
            packages::used(&self.database, &package)?;
            waiting::remove_group(&self.database, &id)?;
            return Ok(vec![Received::Refused { used_package: true }]);
        }
        // The id binds the creator, so the same creator describes the same group. The later epoch
        // is the newer.
        let known = self.group(&id)?.map(|group| group.epoch);
        let waits = requests::get(&self.database, &id)?.map(|kept| kept.request.epoch);
        if known.max(waits).is_some_and(|epoch| epoch >= request.epoch) {
            return Ok(vec![Received::Duplicate]);
        }
        if known.is_none() && !(rules.joins)(&request)? {
            packages::used(&self.database, &package)?;
            requests::keep(&self.database, &request, &package, bytes)?;
            for message in waiting::remove_group(&self.database, &id)? {
                requests::hold(&self.database, &message)?;
            }
            return Ok(vec![Received::Requested(request)]);
        }
        let group = match invitation.join() {
            Ok(group) => group,
            Err(reason) => return Ok(vec![Received::Ignored(reason)]),
        };
        packages::used(&self.database, &package)?;
        self.join(group)
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
            Ok(group) => self.join(group).map(Some),
            Err(reason) => {
                requests::decline(&self.database, id)?;
                Ok(Some(vec![Received::Ignored(reason)]))
            }
        }
    }

    /// Adds a group that was joined, and processes what waited for it.
    fn join(&mut self, group: Group) -> Result<Vec<Received>, DatabaseError> {
        let id = group.id();
        let mut results = vec![Received::Joined(group.summary())];
        self.database.delete(tables::LEFT, id.as_bytes())?;
        self.insert(group);
        let mut held = requests::accepted(&self.database, &id)?;
        held.sort_by_key(|message| message.epoch);
        for message in held {
            self.retry_one(id, message, &mut results)?;
        }
        self.retry(id, &mut results)?;
        Ok(results)
    }

    /// Processes a message that waited with a request, or puts it aside until a commit comes.
    fn retry_one(
        &mut self,
        id: GroupId,
        message: PutAside,
        results: &mut Vec<Received>,
    ) -> Result<(), DatabaseError> {
        let epoch = self.group(&id)?.map_or(0, |group| group.epoch);
        if message.epoch > epoch {
            let message = PutAside { needs: Needs::Commit, ..message };
            let displaced = waiting::put_aside(&self.database, &message)?;
            results.extend(
                displaced.into_iter().map(|one| Received::Unreadable(one.give_up(Lost::Displaced))),
            );
            return Ok(());
        }
        let PutAside { bytes, arrival, .. } = message;
        let parsed = MlsMessageIn::tls_deserialize_exact_bytes(&bytes).map(MlsMessageIn::extract);
        if let Ok(MlsMessageBodyIn::PrivateMessage(message)) = parsed {
            results.push(self.process(id, message, &bytes, arrival)?);
        }
        Ok(())
    }

    /// Processes what waited for the state that `id` is in now, and for the states that this leads
    /// to.
    fn retry(&mut self, id: GroupId, results: &mut Vec<Received>) -> Result<(), DatabaseError> {
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
        message: PrivateMessageIn,
        bytes: &[u8],
        arrival: Arrival,
    ) -> Result<Received, DatabaseError> {
        let group = self.load(id)?.expect("the callers looked it up");
        Ok(match group.process(message) {
            MessageEffect::Message { sender, content } => {
                Received::Message { group: id, channel: group.profile().channel, sender, content }
            }
            MessageEffect::Asked { sender, digests } => {
                Received::Asked { group: id, sender, digests }
            }
            MessageEffect::Leaving { sender } => Received::Leaving { group: id, sender },
            MessageEffect::Committed { added, removed } => {
                Received::Committed { group: id, added, removed }
            }
            MessageEffect::Lost(reason) => {
                Received::Unreadable(unreadable(bytes, Some(id), reason, arrival))
            }
            MessageEffect::Ignored(reason) => Received::Ignored(reason),
        })
    }
}

impl PutAside {
    fn give_up(self, reason: Lost) -> Unreadable {
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
