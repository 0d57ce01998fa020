//! Requests: groups and direct conversations of strangers, which wait for a decision.
//!
//! A stranger is a person that we never wrote to, accepted, added to a group of ours, or compared a
//! safety number with. A stranger's group waits until it is accepted or declined. A stranger's
//! direct conversation begins immediately, while fewer than [`MAX_STRANGERS`] strangers wait for an
//! answer; further ones are requests, too. `qpq-mls` keeps the requests and bounds them.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use qpq_domain::{IdentityKey, UnixMillis, Username};
use qpq_mls::{
    GroupId, GroupKind, GroupSummary, Received,
    database::{Database, DatabaseError},
};

use super::{
    Messenger,
    decisions::Decision,
    directory::MAX_LOOKUPS,
    inbox::unless_final,
    log::{ConversationId, EntryId, Event},
    note::{is_from, note},
    people::{Person, Standing},
    state::State,
    tables::{ACQUAINTED, STRANGERS},
};
use crate::error::Error;

/// The maximum number of strangers whose direct conversation this account has not written in.
pub const MAX_STRANGERS: u64 = 100;
/// The maximum number of MLS groups of the direct conversation with one stranger. A client that
/// lost its state creates a new one.
const MAX_GROUPS_OF_STRANGER: u64 = 4;

/// Present once the people of an earlier release's profile are noted as acquainted.
const ARE_NOTED: &[u8] = b"acquainted";
/// The entry that announces a waiting request, until requests are listed or one is decided on.
const ANNOUNCEMENT: &[u8] = b"requests-announced";

/// A stranger's group or direct conversation that waits to be accepted or declined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContactRequest {
    /// The id by which the request is accepted or declined.
    pub id: GroupId,
    /// The stranger, who created the group.
    pub from: Person,
    /// The group's name; `None` for a direct conversation.
    pub group: Option<String>,
    /// The number of members, including us.
    pub members: usize,
    /// The time at which the server accepted the Welcome.
    pub at: UnixMillis,
}

/// The requests that wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requests {
    /// The waiting requests, the oldest first.
    pub waiting: Vec<ContactRequest>,
    /// The number of requests that were dropped because too many waited.
    pub dropped: u64,
}

impl Messenger {
    /// Returns the requests that wait. The directory is asked about names that are unknown here; a
    /// name that it was not asked about is [`Standing::Claimed`].
    pub async fn requests(&self) -> Result<Requests, Error> {
        let mut requests = self
            .store()
            .change(|state| {
                state.end_announcement()?;
                state.list_requests()
            })
            .await?;
        let mut unchecked: Vec<_> =
            requests.waiting.iter().map(|request| &request.from).filter(is_claimed).collect();
        unchecked.sort_by_key(|person| person.identity);
        unchecked.dedup();
        let mut names = BTreeMap::new();
        for some in unchecked.chunks(MAX_LOOKUPS) {
            let asked = some.iter().map(async |person| {
                self.name_of(&person.identity).await.map(|name| (person.identity, name))
            });
            // A request can be shown without a name that is certain.
            names.extend(join_all(asked).await.into_iter().flatten());
        }
        for ContactRequest { from, .. } in &mut requests.waiting {
            if let Some(name) = names.get(&from.identity) {
                from.standing = self.standing(from, name.as_ref()).await?;
            }
        }
        Ok(requests)
    }

    /// Accepts a request: joins its group. The creator of the group is an acquaintance from
    /// now on. Messages that waited with the request are among the unseen entries afterwards.
    pub async fn accept(&self, request: GroupId) -> Result<ConversationId, Error> {
        let conversation = self
            .store()
            .change(move |state| {
                let conversation = state.accept(&request)?;
                state.share(&Decision::Accepted(request))?;
                Ok(conversation)
            })
            .await?;
        self.send_decisions().await;
        unless_final("names", self.check_names().await)?;
        Ok(conversation)
    }

    /// Declines a request, and drops later messages to its group. The creator is not notified, and
    /// can send another request; [`Messenger::block`] prevents that.
    pub async fn decline(&self, request: GroupId) -> Result<(), Error> {
        self.store()
            .change(move |state| {
                state.end_announcement()?;
                if !state.mls.decline(&request)? {
                    return Err(Error::NoSuchRequest);
                }
                Ok(state.share(&Decision::Declined(request))?)
            })
            .await?;
        self.send_decisions().await;
        Ok(())
    }

    /// Returns the standing of a claimed name, by the directory's name for the key.
    async fn standing(&self, claimed: &Person, name: Option<&Username>) -> Result<Standing, Error> {
        if name != Some(&claimed.username) {
            return Ok(Standing::Refuted);
        }
        Ok(match self.known(&claimed.username).await? {
            Some(known) if known.identity != claimed.identity => Standing::NewKey,
            _ => Standing::Confirmed,
        })
    }

    /// Notes everyone in a profile of an earlier release as acquainted, once.
    pub(super) async fn note_acquaintances(&self) -> Result<(), Error> {
        if self.store().read(|state| Ok(state.number(ARE_NOTED)?.is_some())).await? {
            return Ok(());
        }
        self.store().change(|state| Ok(state.note_everyone()?)).await
    }
}

fn is_claimed(person: &&Person) -> bool {
    person.standing == Standing::Claimed
}

/// Returns whether the group of a Welcome is joined immediately.
pub(super) fn joins(
    database: &Database,
    request: &qpq_mls::Request,
) -> Result<bool, DatabaseError> {
    let creator = request.inviter.identity.as_bytes();
    if database.get(ACQUAINTED, creator)?.is_some() {
        return Ok(true);
    }
    if matches!(request.kind, GroupKind::Group { .. }) {
        return Ok(false);
    }
    Ok(match database.get(STRANGERS, creator)? {
        Some(row) => groups_of_stranger(&row)? < MAX_GROUPS_OF_STRANGER,
        None => database.count(STRANGERS)? < MAX_STRANGERS,
    })
}

fn groups_of_stranger(row: &[u8]) -> Result<u64, DatabaseError> {
    row.try_into()
        .map(u64::from_be_bytes)
        .map_err(|_| DatabaseError::Damaged("a count is cut short".into()))
}

impl State {
    /// Notes that a new profile has no people of an earlier release.
    pub(super) fn begin_noting_acquaintances(&self) -> Result<(), DatabaseError> {
        self.set_number(ARE_NOTED, Some(1))
    }

    /// Notes everyone in the profile as acquainted.
    fn note_everyone(&self) -> Result<(), DatabaseError> {
        for identity in self.people.everyone()? {
            self.note_acquaintance(&identity)?;
        }
        self.begin_noting_acquaintances()
    }

    /// Returns whether a person is an acquaintance.
    pub(super) fn is_acquainted(&self, identity: &IdentityKey) -> Result<bool, DatabaseError> {
        Ok(self.database().get(ACQUAINTED, identity.as_bytes())?.is_some())
    }

    /// Returns all acquaintances.
    pub(super) fn acquaintances(&self) -> Result<Vec<IdentityKey>, DatabaseError> {
        let people = self.people.everyone()?;
        let mut known = Vec::new();
        for identity in people {
            if self.is_acquainted(&identity)? {
                known.push(identity);
            }
        }
        Ok(known)
    }

    /// Notes that a person is an acquaintance.
    pub(super) fn note_acquaintance(&self, identity: &IdentityKey) -> Result<(), DatabaseError> {
        if !self.is_acquainted(identity)? {
            self.database().put(ACQUAINTED, identity.as_bytes(), None, b"")?;
            self.forget_stranger(identity)?;
        }
        Ok(())
    }

    /// Removes a stranger's direct conversation from the count.
    pub(super) fn forget_stranger(&self, identity: &IdentityKey) -> Result<(), DatabaseError> {
        self.database().delete(STRANGERS, identity.as_bytes()).map(drop)
    }

    /// Counts a direct conversation that was joined, if a stranger began it.
    pub(super) fn count_stranger(&self, group: &GroupSummary) -> Result<(), DatabaseError> {
        let creator = group.creator.as_bytes();
        let is_stranger = !self.is_acquainted(&group.creator)?;
        if matches!(group.kind, GroupKind::Direct { .. }) && is_stranger {
            let groups = match self.database().get(STRANGERS, creator)? {
                Some(row) => groups_of_stranger(&row)?,
                None => 0,
            };
            self.database().put(STRANGERS, creator, None, &(groups + 1).to_be_bytes())?;
        }
        Ok(())
    }

    /// Announces a request by an entry, unless an earlier announcement is unseen. Otherwise
    /// strangers could fill the history.
    pub(super) fn announce(&self, request: qpq_mls::Request, at: UnixMillis) -> Result<(), Error> {
        if self.number(ANNOUNCEMENT)?.is_some() {
            return Ok(());
        }
        let by = request.inviter.identity;
        self.people.claim(by, &request.inviter.username)?;
        let entry =
            self.log.push(None, at, Event::Requested { by, group: name_of(request.kind) })?;
        Ok(self.set_number(ANNOUNCEMENT, Some(entry.0))?)
    }

    /// Marks the announcement as seen. The next request is announced again.
    fn end_announcement(&self) -> Result<(), DatabaseError> {
        if let Some(entry) = self.number(ANNOUNCEMENT)? {
            self.log.mark_seen(&[EntryId(entry)])?;
            self.set_number(ANNOUNCEMENT, None)?;
        }
        Ok(())
    }

    fn list_requests(&self) -> Result<Requests, Error> {
        let waiting = self.mls.requests()?.into_iter().map(|request| {
            let identity = request.inviter.identity;
            let from = match self.people.is_named(&identity)? {
                true => self.people.person(&identity)?,
                false => Person {
                    identity,
                    username: request.inviter.username,
                    standing: Standing::Claimed,
                },
            };
            let (id, members, at) = (request.group, request.members, request.arrival.at);
            Ok(ContactRequest { id, from, group: name_of(request.kind), members, at })
        });
        let waiting = waiting.collect::<Result<_, DatabaseError>>()?;
        Ok(Requests { waiting, dropped: self.mls.dropped_requests()? })
    }

    /// Joins the group of a request.
    pub(super) fn accept(&mut self, id: &GroupId) -> Result<ConversationId, Error> {
        let request = self.mls.request(id)?.ok_or(Error::NoSuchRequest)?;
        let at = request.arrival.at;
        self.end_announcement()?;
        self.note_acquaintance(&request.inviter.identity)?;
        let blocked = self.blocked()?;
        let received = self.mls.accept(id)?.ok_or(Error::NoSuchRequest)?;
        let conversation = self.conversation_of(id)?;
        for one in received {
            // We are not an admin of a group that we were just invited to.
            if !is_from(&one, &blocked) && !matches!(one, Received::Leaving { .. }) {
                note(self, one, at)?;
            }
        }
        if request.missed > 0 {
            let reason = format!(
                "{} messages came before the request was accepted, and there was \
                                  no room for them",
                request.missed
            );
            self.log.push(conversation, at, Event::Unreadable { from: None, reason })?;
        }
        conversation.ok_or(Error::NoSuchRequest)
    }
}

fn name_of(kind: GroupKind) -> Option<String> {
    match kind {
        GroupKind::Group { name } => Some(name),
        GroupKind::Direct { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::ChannelId;
    use qpq_mls::{Arrival, Identity, Member};

    use super::*;

    fn state() -> State {
        let name = Username::parse("bob").unwrap();
        State::create(&Database::in_memory(), Identity::generate(), name).unwrap()
    }

    fn direct(state: &State, stranger: u8) -> (qpq_mls::Request, GroupSummary) {
        let (identity, at) = (IdentityKey::new([stranger; 32]), UnixMillis(1));
        let creator = Member { identity, username: Username::parse("mallory").unwrap() };
        let kind = GroupKind::Direct { peer: state.me() };
        let (group, channel) =
            (GroupId::try_from(&[stranger; 32][..]).unwrap(), ChannelId::DEFAULT);
        let request = qpq_mls::Request {
            group,
            kind: kind.clone(),
            inviter: creator.clone(),
            members: 2,
            epoch: 1,
            arrival: Arrival { at, channel },
            missed: 0,
        };
        let (id, creator, members) = (group, identity, vec![creator]);
        let admins = vec![creator];
        let created_at = at;
        let summary = GroupSummary {
            id,
            kind,
            channel,
            creator,
            created_at,
            epoch: 1,
            admins,
            members,
            active: true,
        };
        (request, summary)
    }

    #[test]
    fn direct_conversations_of_strangers_are_bounded_each_and_in_total() {
        let state = state();
        let joins = |request: &_| joins(state.database(), request).unwrap();
        let cap = u8::try_from(MAX_STRANGERS).unwrap();
        for stranger in 0..cap {
            let (request, summary) = direct(&state, stranger);
            assert!(joins(&request));
            state.count_stranger(&summary).unwrap();
        }
        let (further, _) = direct(&state, cap);
        assert!(!joins(&further));
        let (first, summary) = direct(&state, 0);
        for _ in 1..MAX_GROUPS_OF_STRANGER {
            assert!(joins(&first), "the conversation exists");
            state.count_stranger(&summary).unwrap();
        }
        assert!(!joins(&first));

        // Our answer makes room for others, and ends the bound for that person.
        state.note_acquaintance(&summary.creator).unwrap();
        assert!(joins(&first) && joins(&further));
        state.count_stranger(&summary).unwrap();
        assert_eq!(state.database().count(STRANGERS).unwrap(), MAX_STRANGERS - 1);
        let group = |request: &qpq_mls::Request| qpq_mls::Request {
            kind: GroupKind::Group { name: "friends".into() },
            ..request.clone()
        };
        assert!(joins(&group(&first)) && !joins(&group(&further)));
    }

    #[test]
    fn people_of_an_earlier_release_are_not_strangers() {
        let state = state();
        let (request, _) = direct(&state, 1);
        let group = qpq_mls::Request { kind: GroupKind::Group { name: "g".into() }, ..request };
        let creator = &group.inviter;
        state.people.claim(creator.identity, &creator.username).unwrap();
        assert!(!joins(state.database(), &group).unwrap());
        state.note_everyone().unwrap();
        assert!(joins(state.database(), &group).unwrap());
    }
}
