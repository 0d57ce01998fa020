//! Repair of messages that cannot be read. Each is shown as an entry, and its sender's client is
//! asked to repeat it.
//!
//! The receiver creates a new direct group with the sender, from a fresh KeyPackage. In this group
//! it asks for the messages, named by the SHA-256 of their bytes. The sender's client repeats the
//! texts that it still has and that were for the receiver, marked as repeats. Both then use this
//! group, since it is the newest one of the two people.
//!
//! The sender of an unreadable message is only a claim, so repair is bounded: one question an hour
//! and five questions in total to each person, and one answer to each person in ten minutes.
//! Questions wait for at most [`MAX_PEOPLE`] people and [`MAX_LOST_IN_TOTAL`] messages; above these
//! bounds, those to strangers are dropped first. A question without an answer within
//! [`ASKED_WITHIN`] is dropped.

use std::{cmp::Reverse, collections::BTreeSet, time::Duration};

use qpq_domain::{IdentityKey, UnixMillis};
use qpq_mls::{
    Content, GroupId, GroupKind, Lost, Member, Unreadable,
    database::{DatabaseError, Item, NewItem, Table},
    direct_channel,
};

use super::{
    Messenger,
    files::is_showable,
    inbox::unless_final,
    log::{ConversationId, EntryId, Event},
    now,
    outbox::fresh_message_id,
    records::Corrupt,
    send::MAX_TEXT,
    state::State,
};
use crate::error::Error;

/// Digests of messages that could not be read, in the lane of the claimed sender.
const LOST: Table = Table::new(38);
/// People to ask: the time of the next question, the number of questions so far, and the key.
const QUESTIONS: Table = Table::new(39);
/// The entry and the time of each ciphertext of ours, by its digest. Oldest first.
const SENT: Table = Table::new(40);
/// The time of the last answer to each person.
const ANSWERED: Table = Table::new(41);

const ASK_AGAIN_AFTER: Duration = Duration::from_secs(3600);
const MAX_QUESTIONS: u8 = 5;
/// The maximum number of people that are asked in one repair.
const MAX_ASKED: usize = 4;
/// The maximum number of messages that one person is asked for.
const MAX_LOST: usize = 256;
/// The maximum number of messages that all people are asked for.
const MAX_LOST_IN_TOTAL: u64 = 4_096;
/// The maximum number of people to ask.
const MAX_PEOPLE: u64 = 256;
/// The maximum number of people whose last answer is noted. While all of these answers are recent,
/// no further person is answered.
const MAX_ANSWERED: u64 = 256;
const ANSWER_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// The time within which a message may be asked for. A message may be in the inbox for 90 days and
/// wait for its commit for 31 days, and the question may be in our inbox for 30 days. The time is
/// doubled for devices that are seldom online.
const ASKED_WITHIN: Duration = Duration::from_secs(300 * 24 * 3600);
/// The maximum tolerated difference between two clocks.
const CLOCK_MARGIN: Duration = Duration::from_secs(24 * 3600);

impl Messenger {
    /// Sends the questions for unreadable messages that are due.
    pub(super) async fn repair(&self) -> Result<(), Error> {
        let due = self
            .store()
            .read(|state| Ok((state.due_questions(now())?, state.are_questions_over(now())?)))
            .await?;
        let (due, are_over) = due;
        if are_over {
            self.store().change(|state| state.forget_old_questions(now())).await?;
        }
        for peer in due {
            // Noted first: a question that fails is not repeated immediately.
            self.store().change(move |state| state.postpone_question(&peer, now())).await?;
            match self.ask(peer).await {
                Err(error @ (Error::Call(_) | Error::Auth(_) | Error::Profile(_))) => {
                    unless_final("repair", Err(error))?;
                }
                // The directory does not know the person, has another key, or has no KeyPackage.
                Err(error) => tracing::info!(%error, "a sender cannot be asked to repeat messages"),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    async fn ask(&self, peer: IdentityKey) -> Result<(), Error> {
        let person = self.person(peer).await?;
        let newest = self
            .store()
            .read(move |state| {
                if state.lost_of(&peer)?.is_empty() || state.is_blocked(&peer)? {
                    return Ok(None);
                }
                let known = state.mls.direct_groups(&peer)?;
                let newest = known.iter().map(|group| group.created_at.0 + 1).max();
                Ok(Some(UnixMillis(newest.unwrap_or(0))))
            })
            .await?;
        let Some(newest) = newest else { return Ok(()) };
        let group = self.begin_direct(&person, newest).await?;
        self.store()
            .change(move |state| {
                let digests = state.lost_of(&peer)?;
                state.count_encryption()?;
                let question = state.mls.ask(group, digests)?;
                Ok(state.outbox.push(question, None, now())?)
            })
            .await
    }
}

impl State {
    /// Notes a message whose content is lost to us, and the person to ask for it.
    pub(super) fn note_unreadable(
        &mut self,
        lost: &Unreadable,
        at: UnixMillis,
    ) -> Result<(), Error> {
        let me = self.me();
        let from = lost.claimed_sender.filter(|sender| *sender != me);
        let mut conversation = match lost.group {
            Some(group) => self.conversation_of(&group)?,
            None => None,
        };
        if let Some(from) = from.filter(|from| is_direct(&me, from, lost)) {
            conversation = conversation.or(Some(ConversationId::Direct(from)));
        }
        let event = Event::Unreadable { from, reason: lost.reason.to_string() };
        self.log.push(conversation, at, event)?;
        // A removed member is not asked: the message was readable, and is refused.
        let Some(from) = from.filter(|_| lost.reason != Lost::NotAMember) else { return Ok(()) };
        if self.database().count_in_lane(LOST, from.as_bytes())? < MAX_LOST as u64 {
            self.database().put(LOST, &lost.digest, Some(from.as_bytes()), &lost.digest)?;
            if self.database().get(QUESTIONS, from.as_bytes())?.is_none() {
                self.set_question(&from, UnixMillis(0), 0)?;
            }
            self.bound_questions()?;
        }
        Ok(())
    }

    /// Drops questions until the bounds on people and messages hold: first those to strangers, then
    /// those that were asked most often, then those that are due earliest.
    fn bound_questions(&self) -> Result<(), Error> {
        while self.database().count(QUESTIONS)? > MAX_PEOPLE
            || self.database().count(LOST)? > MAX_LOST_IN_TOTAL
        {
            let mut ranked = Vec::new();
            for Question { peer, at, asked } in self.questions()? {
                ranked.push((!self.is_acquainted(&peer)?, asked, Reverse(at), peer));
            }
            let Some((.., last)) = ranked.into_iter().max() else { return Ok(()) };
            self.forget_questions(&last)?;
        }
        Ok(())
    }

    fn are_questions_over(&self, now: UnixMillis) -> Result<bool, Error> {
        Ok(self.questions()?.iter().any(|question| question.is_over(now)))
    }

    /// Drops the questions that were not answered in time.
    fn forget_old_questions(&self, now: UnixMillis) -> Result<(), Error> {
        for question in self.questions()?.iter().filter(|question| question.is_over(now)) {
            self.forget_questions(&question.peer)?;
        }
        Ok(())
    }

    /// Notes messages as lost that have waited in vain. These are messages to an unknown direct
    /// group, once the inbox was read to its end, since its Welcome is sent before all other
    /// messages; and those that have waited too long.
    pub(super) fn note_lost(&mut self) -> Result<(), Error> {
        let me = self.me();
        let mut over = BTreeSet::new();
        for channel in self.mls.unknown_channels()? {
            // This device may join the group by itself, if the account has other devices.
            if !self.has_other_devices()? || self.was_tried(channel)? {
                over.insert(channel);
            }
        }
        let mut lost = self.mls.remove_waiting_if(|lost| {
            let channel = lost.arrival.channel;
            let is_direct = lost.claimed_sender.is_some_and(|sender| is_direct(&me, &sender, lost));
            is_direct && over.contains(&channel)
        })?;
        lost.extend(self.mls.remove_expired_waiting(now())?);
        let blocked = self.blocked()?;
        lost.retain(|lost| lost.claimed_sender.is_none_or(|sender| !blocked.contains(&sender)));
        for lost in lost {
            self.note_unreadable(&lost, lost.arrival.at)?;
        }
        Ok(())
    }

    /// Processes a message that repeats an earlier one, which may have been unreadable here.
    pub(super) fn process_repeat(
        &mut self,
        sender: &Member,
        content: Content,
        digest: [u8; 32],
        at: UnixMillis,
    ) -> Result<(), Error> {
        let from = sender.identity;
        let was_lost = self.lost_of(&from)?.contains(&digest);
        if !was_lost || content.text.len() > MAX_TEXT || !is_showable(content.file.as_ref()) {
            return Ok(());
        }
        self.database().delete(LOST, &digest)?;
        if self.lost_of(&from)?.is_empty() {
            self.database().delete(QUESTIONS, from.as_bytes())?;
        }
        let sent_at = UnixMillis(content.sent_at);
        let event = Event::Received { from, text: content.text, sent_at, file: content.file };
        self.log.push(Some(ConversationId::Direct(from)), at, event)?;
        Ok(())
    }

    /// Answers a person who could not read messages of ours: repeats those that were for this
    /// person.
    pub(super) fn answer(
        &mut self,
        group: GroupId,
        asker: &IdentityKey,
        digests: Vec<[u8; 32]>,
    ) -> Result<(), Error> {
        if !self.may_answer(asker, now())? {
            return Ok(());
        }
        let me = self.me();
        let Some(asked_in) = self.mls.group(&group)? else { return Ok(()) };
        // A commit that waited for the same message may have removed us since.
        if !asked_in.active || asked_in.peer_of(&me) != Some(*asker) {
            return Ok(());
        }
        // Nothing more is sent to groups that the asker may be unable to read.
        for other in self.mls.direct_groups(asker)? {
            if other.id != group {
                self.mls.retire(&other.id)?;
            }
        }
        for digest in digests.into_iter().take(MAX_LOST) {
            let Some(item) = self.database().item_of_key(SENT, &digest)? else { continue };
            let (entry, _) = parse_sent(&item)?;
            let Some(kept) = self.log.get(entry)? else { continue };
            let Event::Sent { text, file, .. } = kept.entry.event else { continue };
            if !self.was_for(kept.entry.conversation, asker)? {
                continue;
            }
            let content = Content {
                id: *fresh_message_id(now()).as_bytes(),
                sent_at: kept.entry.at.0,
                text,
                repeats: Some(digest),
                file,
            };
            self.count_encryption()?;
            match self.mls.encrypt(group, &content) {
                Ok(parcel) => self.outbox.push(parcel, None, now())?,
                Err(qpq_mls::Error::Database(error)) => return Err(error.into()),
                Err(error) => {
                    tracing::info!(%error, "a question about lost messages is not answered");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Returns whether an answer to this person is due, and notes it. A person who is not answered
    /// asks again.
    fn may_answer(&self, asker: &IdentityKey, now: UnixMillis) -> Result<bool, Error> {
        // A time after now is from a wrong clock.
        let is_recent = |row: &[u8]| {
            let last = UnixMillis(row.try_into().map(u64::from_be_bytes).unwrap_or(0));
            last <= now && last.plus(ANSWER_AGAIN_AFTER) > now
        };
        if self.database().get(ANSWERED, asker.as_bytes())?.is_some_and(|row| is_recent(&row)) {
            return Ok(false);
        }
        if self.database().count(ANSWERED)? >= MAX_ANSWERED {
            self.database().delete_where(ANSWERED, |row| !is_recent(row))?;
            if self.database().count(ANSWERED)? >= MAX_ANSWERED {
                return Ok(false);
            }
        }
        self.database().put(ANSWERED, asker.as_bytes(), None, &now.0.to_be_bytes())?;
        Ok(true)
    }

    fn was_for(
        &self,
        conversation: Option<ConversationId>,
        asker: &IdentityKey,
    ) -> Result<bool, Error> {
        Ok(match conversation {
            Some(ConversationId::Direct(peer)) => peer == *asker,
            Some(ConversationId::Group(id)) => self.mls.group(&id)?.is_some_and(|group| {
                matches!(group.kind, GroupKind::Group { .. })
                    && group.members.iter().any(|member| member.identity == *asker)
            }),
            None => false,
        })
    }

    /// Notes the entry of a ciphertext of ours, to repeat its text to members that cannot read it.
    pub(super) fn note_sent(
        &self,
        payload: &[u8],
        entry: EntryId,
        now: UnixMillis,
    ) -> Result<(), Error> {
        use sha2::{Digest as _, Sha256};
        let digest: [u8; 32] = Sha256::digest(payload).into();
        let new = NewItem { key: Some(&digest), ..NewItem::default() };
        self.database().append(SENT, new, &sent(entry, now))?;
        Ok(())
    }

    /// Returns whether this device sent the ciphertext of a digest.
    pub(super) fn was_sent_here(&self, digest: &[u8; 32]) -> Result<bool, DatabaseError> {
        Ok(self.database().number_of_key(SENT, digest)?.is_some())
    }

    /// Forgets ciphertexts of ours that clients no longer ask for: of the `limit` oldest, those
    /// that were encrypted [`ASKED_WITHIN`] ago. Returns their number.
    pub(super) fn forget_sent(&self, now: UnixMillis, limit: u32) -> Result<usize, Error> {
        let mut forgotten = 0;
        for item in self.database().items_after(SENT, None, limit)? {
            let (entry, at) = parse_sent(&item)?;
            if at.plus(ASKED_WITHIN) <= now {
                self.database().remove_item(SENT, item.number)?;
                forgotten += 1;
            } else if at > now.plus(CLOCK_MARGIN) {
                // The clock was ahead. The item gets the present time, or it would stay until that
                // later time.
                self.database().replace_item(SENT, item.number, &sent(entry, now))?;
            }
        }
        Ok(forgotten)
    }

    /// Drops the questions to a person, and the digests of messages that were lost so far.
    pub(super) fn forget_questions(&self, peer: &IdentityKey) -> Result<(), Error> {
        self.database().delete_lane(LOST, peer.as_bytes())?;
        self.database().delete(QUESTIONS, peer.as_bytes())?;
        Ok(())
    }

    fn lost_of(&self, peer: &IdentityKey) -> Result<Vec<[u8; 32]>, Error> {
        let rows = self.database().in_lane(LOST, peer.as_bytes())?;
        Ok(rows.iter().filter_map(|row| row[..].try_into().ok()).collect())
    }

    fn due_questions(&self, now: UnixMillis) -> Result<Vec<IdentityKey>, Error> {
        let questions = self.questions()?.into_iter();
        let due = questions
            .filter(|question| question.at <= now && question.asked < MAX_QUESTIONS)
            .map(|question| question.peer);
        Ok(due.take(MAX_ASKED).collect())
    }

    fn questions(&self) -> Result<Vec<Question>, Error> {
        let rows = self.database().all(QUESTIONS)?;
        Ok(rows.iter().filter_map(|row| Question::parse(row)).collect())
    }

    fn postpone_question(&self, peer: &IdentityKey, now: UnixMillis) -> Result<(), Error> {
        let asked = self.database().get(QUESTIONS, peer.as_bytes())?;
        let asked = asked.and_then(|row| row.get(8).copied()).unwrap_or(0);
        self.set_question(peer, now.plus(ASK_AGAIN_AFTER), asked.saturating_add(1))
    }

    fn set_question(&self, peer: &IdentityKey, at: UnixMillis, asked: u8) -> Result<(), Error> {
        let row = [&at.0.to_be_bytes()[..], &[asked], peer.as_bytes()].concat();
        Ok(self.database().put(QUESTIONS, peer.as_bytes(), None, &row)?)
    }
}

/// A person to be asked for messages.
struct Question {
    peer: IdentityKey,
    /// The time of the next question.
    at: UnixMillis,
    asked: u8,
}

impl Question {
    fn parse(row: &[u8]) -> Option<Self> {
        let (at, rest) = row.split_at_checked(8)?;
        let (&asked, key) = rest.split_first()?;
        let at = UnixMillis(u64::from_be_bytes(at.try_into().ok()?));
        Some(Self { peer: IdentityKey::try_from(key).ok()?, at, asked })
    }

    /// Returns whether the time for an answer is over. Always false before the question was sent
    /// once.
    fn is_over(&self, now: UnixMillis) -> bool {
        self.asked > 0 && self.at.plus(ASKED_WITHIN) <= now
    }
}

fn sent(entry: EntryId, at: UnixMillis) -> [u8; 16] {
    let mut value = [0; 16];
    value[..8].copy_from_slice(&entry.0.to_be_bytes());
    value[8..].copy_from_slice(&at.0.to_be_bytes());
    value
}

fn parse_sent(item: &Item) -> Result<(EntryId, UnixMillis), Error> {
    let value: [u8; 16] =
        item.value[..].try_into().map_err(Corrupt::new).map_err(DatabaseError::from)?;
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    Ok((EntryId(number(&value[..8])), UnixMillis(number(&value[8..]))))
}

/// Returns whether an unreadable message was sent on the channel of the direct conversation with
/// `peer`.
fn is_direct(me: &IdentityKey, peer: &IdentityKey, lost: &Unreadable) -> bool {
    direct_channel(me, peer) == lost.arrival.channel
}

#[cfg(test)]
mod tests {
    use qpq_domain::{ChannelId, Username};
    use qpq_mls::{Arrival, Change, Identity, NewMember, database::Database};
    use sha2::Digest as _;

    use super::*;
    use crate::messenger::{log::DeliveryState, outbox::RecipientStatus, send::encrypt_entry};

    const DAY: Duration = Duration::from_secs(24 * 3600);
    const START: UnixMillis = UnixMillis(1_800_000_000_000);

    fn state() -> State {
        let name = Username::parse("alice").unwrap();
        State::create(&Database::in_memory(), Identity::generate(), name).unwrap()
    }

    fn key(number: u64) -> IdentityKey {
        let mut key = [7; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        IdentityKey::new(key)
    }

    fn lose(state: &mut State, peer: u64, message: u64) {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&peer.to_be_bytes());
        digest[8..16].copy_from_slice(&message.to_be_bytes());
        let lost = Unreadable {
            reason: Lost::NoKeys,
            digest,
            group: None,
            claimed_sender: Some(key(peer)),
            arrival: Arrival { at: START, channel: ChannelId::DEFAULT },
        };
        state.note_unreadable(&lost, START).unwrap();
    }

    fn count(state: &State) -> (u64, u64) {
        (state.database().count(QUESTIONS).unwrap(), state.database().count(LOST).unwrap())
    }

    #[test]
    fn invented_senders_are_bounded_and_displace_nobody_who_is_known() {
        let mut state = state();
        state.note_acquaintance(&key(0)).unwrap();
        lose(&mut state, 0, 0);
        for peer in 1..300 {
            lose(&mut state, peer, 0);
        }
        assert_eq!(count(&state), (MAX_PEOPLE, MAX_PEOPLE));
        for peer in 1..18 {
            (0..260).for_each(|message| lose(&mut state, peer, message));
        }
        let (people, lost) = count(&state);
        assert!(people <= MAX_PEOPLE && lost <= MAX_LOST_IN_TOTAL, "{people} {lost}");
        assert_eq!(state.lost_of(&key(0)).unwrap().len(), 1);
    }

    #[test]
    fn a_removed_member_is_shown_and_not_asked() {
        let mut state = state();
        let lost = Unreadable {
            reason: Lost::NotAMember,
            digest: [1; 32],
            group: None,
            claimed_sender: Some(key(1)),
            arrival: Arrival { at: START, channel: ChannelId::DEFAULT },
        };
        state.note_unreadable(&lost, START).unwrap();
        assert_eq!(count(&state), (0, 0));
        let shown = state.log.unseen(None, 10).unwrap();
        let reason = Lost::NotAMember.to_string();
        let expected = Event::Unreadable { from: Some(key(1)), reason };
        assert_eq!(shown.into_iter().map(|entry| entry.event).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn a_person_who_did_not_answer_for_300_days_is_given_up() {
        let mut state = state();
        for peer in [1, 2] {
            lose(&mut state, peer, 0);
        }
        state.postpone_question(&key(1), START).unwrap();
        let over = START.plus(ASK_AGAIN_AFTER + DAY * 300);
        for (now, left) in [(over.minus(DAY), 2), (over, 1), (over.plus(DAY * 300), 1)] {
            state.forget_old_questions(now).unwrap();
            assert_eq!(count(&state), (left, left));
        }
        assert_eq!(state.due_questions(over).unwrap(), [key(2)], "who was not asked yet stays");
    }

    #[test]
    fn a_question_that_cannot_be_answered_does_not_stop_the_inbox() {
        let mut alice = state();
        let name = || Username::parse("bob").unwrap();
        let mut bob = State::create(&Database::in_memory(), Identity::generate(), name()).unwrap();
        let group = alice.mls.create_direct(bob.me(), START).unwrap();
        let key_package = bob.mls.key_packages(1, now()).unwrap().remove(0);
        let added = NewMember { identity: bob.me(), username: name(), key_package };
        let change = Change { add: vec![added], ..Change::default() };
        alice.mls.commit(group, &change, now()).unwrap().unwrap();
        alice.mls.confirm(group).unwrap();
        let conversation = ConversationId::Direct(bob.me());
        let sent = Event::Sent { text: "hi".into(), delivery: DeliveryState::Queued, file: None };
        let entry = alice.log.push_own(conversation, now(), sent).unwrap();
        encrypt_entry(&mut alice, conversation, entry, "hi".into(), None).unwrap();
        let (place, item) =
            alice.outbox.next(None, alice.outbox.end().unwrap()).unwrap().expect("one item");
        let digest = sha2::Sha256::digest(&item.payload).into();
        alice.outbox.settle(place, &[(bob.me(), RecipientStatus::Accepted)]).unwrap();

        // More keys than a group can skip.
        alice.mls.skip_keys(100_000).unwrap();
        alice.answer(group, &bob.me(), vec![digest]).unwrap();
        assert!(alice.outbox.is_empty().unwrap());
    }

    #[test]
    fn answers_are_noted_for_ten_minutes_and_bounded() {
        let state = state();
        for number in 0..MAX_ANSWERED {
            assert!(state.may_answer(&key(number), START).unwrap());
        }
        assert!(!state.may_answer(&key(0), START).unwrap());
        assert!(!state.may_answer(&key(MAX_ANSWERED), START).unwrap(), "it asks again later");
        let later = START.plus(ANSWER_AGAIN_AFTER);
        assert!(state.may_answer(&key(MAX_ANSWERED), later).unwrap());
        assert_eq!(state.database().count(ANSWERED).unwrap(), 1);
        assert!(state.may_answer(&key(MAX_ANSWERED), START).unwrap(), "the clock was ahead");
    }
}
