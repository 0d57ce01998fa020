//! Rules of [`crate::Groups`].

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use qpq_domain::{
    DeliveryLimits, GroupId, IdentityKey, KeyPackageLimits, MAX_MEMBERS, MessageId, Pair, Role,
    Seq, UnixMillis,
};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, Person, all, device_id, message, of_device, only, seqs},
};
use crate::{
    Commit, Creation, Enqueued, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, GroupView,
    Groups, MemberPage, MetadataChange, NewGroup, NewMembers, Stores,
};

const G: GroupId = GroupId::new([0xee; 16]);
const FIRST_PAGE: MemberPage = MemberPage { after: 0, limit: 1_000 };

fn new_group(creator: Person, others: &[Person]) -> NewGroup {
    let others = others.iter().map(|person| person.identity).collect();
    NewGroup {
        id: G,
        creator: creator.account,
        members: NewMembers::Listed(others),
        name: "friends".into(),
        description: "of alice".into(),
        now: NOW,
    }
}

fn direct(creator: Person, id: u8, other: Person) -> NewGroup {
    let pair = Pair::new(creator.identity, other.identity).expect("two");
    let members = NewMembers::Direct(pair);
    NewGroup { id: GroupId::new([id; 16]), members, ..new_group(creator, &[]) }
}

/// A message of `sender` to all other members, without a commit.
fn to_others(sender: Person, text: &str) -> GroupMessage {
    let one = message(sender, sender, text);
    GroupMessage {
        group: G,
        sender: sender.account,
        sender_key: sender.identity,
        sender_device: None,
        recipients: GroupRecipients::Others,
        payload: one.payload,
        payload_sha256: one.payload_sha256,
        message_id: None,
        ttl: one.ttl,
        now: NOW,
        commit: None,
    }
}

fn commit(sender: Person, text: &str, epoch: u64) -> GroupMessage {
    let commit = Some(Commit { expected_epoch: epoch, group_info: None });
    GroupMessage { commit, ..to_others(sender, text) }
}

impl GroupMessage {
    fn to(self, recipients: &[Person]) -> Self {
        let listed = recipients.iter().map(|person| person.identity).collect();
        Self { recipients: GroupRecipients::Listed(listed), ..self }
    }

    fn with_id(self, n: u8) -> Self {
        Self { message_id: Some(MessageId::new([n; 16])), ..self }
    }

    fn with_info(self, info: &'static str) -> Self {
        let commit = self.commit.map(|commit| Commit { group_info: Some(info.into()), ..commit });
        Self { commit, ..self }
    }

    fn at(self, now: UnixMillis) -> Self {
        Self { now, ..self }
    }
}

impl Bench {
    fn groups(&self) -> &dyn Groups {
        &*self.stores.groups
    }

    /// Registers this many people and creates a group of them; the first one is the admin.
    async fn group(&self, people: u8) -> Vec<Person> {
        let mut persons = Vec::new();
        for n in 1..=people {
            persons.push(self.person(n).await);
        }
        let created = self.create(new_group(persons[0], &persons[1..])).await;
        assert_eq!(created, Ok(Creation::Created(G)));
        persons
    }

    async fn create(&self, group: NewGroup) -> Result<Creation, GroupRefusal> {
        self.groups().create(group).await.expect("create")
    }

    async fn add(&self, actor: Person, members: &[Person]) -> Result<u32, GroupRefusal> {
        let members = members.iter().map(|person| person.identity).collect();
        self.groups().add_members(G, actor.account, members, NOW).await.expect("add")
    }

    async fn remove(&self, actor: Person, member: Person) -> Result<(), GroupRefusal> {
        self.groups().remove_member(G, actor.account, member.identity).await.expect("remove")
    }

    async fn view(&self, viewer: Person) -> Result<GroupView, GroupRefusal> {
        self.groups().members(G, viewer.account, FIRST_PAGE).await.expect("members")
    }

    /// Returns the members and their roles, as a member sees them.
    async fn roles(&self, viewer: Person) -> Vec<(String, Role)> {
        let view = self.view(viewer).await.expect("a member");
        view.members.into_iter().map(|member| (member.username, member.role)).collect()
    }

    async fn update(&self, actor: Person, change: MetadataChange) -> Result<u64, GroupRefusal> {
        self.groups().update(G, actor.account, change).await.expect("update")
    }

    async fn info(&self, viewer: Person) -> Result<(Option<Bytes>, u64), GroupRefusal> {
        let info = self.groups().info(G, viewer.account).await.expect("info");
        info.map(|info| (info.group_info, info.epoch))
    }

    async fn send_to_group(&self, message: GroupMessage) -> Result<GroupSent, GroupRefusal> {
        self.groups().send(message).await.expect("send")
    }

    /// Sends a message to all members, which must be accepted by all. Returns the epoch.
    async fn announce(&self, message: GroupMessage) -> u64 {
        let sent = self.send_to_group(message).await.expect("accepted");
        assert_eq!((sent.skipped, sent.is_repeat), (0, false));
        assert_eq!(sent.outcomes, []);
        sent.epoch
    }
}

fn named(n: usize, role: Role) -> (String, Role) {
    (format!("person{n}"), role)
}

pub async fn a_group_is_as_it_was_created(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    bench.crash().await;
    let view = bench.view(people[2]).await.expect("a member");
    assert_eq!((&*view.name, &*view.description), ("friends", "of alice"));
    assert_eq!((view.version, view.epoch, view.next), (0, 0, None));
    assert!(view.settings.is_empty());
    assert!(view.members.iter().all(|member| member.joined_at == NOW));
    assert_eq!(view.members[1].identity, people[1].identity);
    let roles = [named(1, Role::Admin), named(2, Role::Member), named(3, Role::Member)];
    assert_eq!(bench.roles(people[0]).await, roles);
    assert_eq!(bench.info(people[1]).await, Ok((None, 0)));
}

pub async fn a_repeated_creation_returns_the_group(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    let stranger = bench.person(9).await;
    let again = NewGroup { name: "other".into(), ..new_group(people[0], &[stranger]) };
    assert_eq!(bench.create(again).await, Ok(Creation::Existed(G)));
    assert_eq!(bench.create(new_group(people[1], &[])).await, Ok(Creation::Existed(G)));
    assert_eq!(bench.create(new_group(stranger, &[])).await, Err(GroupRefusal::IdTaken));
    let view = bench.view(people[0]).await.expect("a member");
    assert_eq!((&*view.name, view.members.len()), ("friends", 2));
}

pub async fn a_creation_with_an_unknown_member_creates_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.person(1).await, bench.person(2).await);
    let nobody = Person { identity: IdentityKey::new([9; 32]), ..bob };
    let refused = Err(GroupRefusal::NoSuchAccount(nobody.identity));
    assert_eq!(bench.create(new_group(alice, &[bob, nobody])).await, refused);
    assert_eq!(bench.view(alice).await, Err(GroupRefusal::NotFound));
    let refused = Err(GroupRefusal::NoSuchAccount(nobody.identity));
    assert_eq!(bench.create(direct(alice, 1, nobody)).await, refused);
    // The creator may be among the members, and a member twice.
    assert_eq!(bench.create(new_group(alice, &[bob, alice, bob])).await, Ok(Creation::Created(G)));
    assert_eq!(bench.roles(bob).await, [named(1, Role::Admin), named(2, Role::Member)]);
}

pub async fn a_direct_group_has_one_id_whichever_member_creates_it(factory: &dyn Factory) {
    for _ in 0..5 {
        let bench = Bench::new(factory).await;
        let (alice, bob) = (bench.person(1).await, bench.person(2).await);
        let mut tasks = JoinSet::new();
        for n in 0..8 {
            let (creator, other) = if n % 2 == 0 { (alice, bob) } else { (bob, alice) };
            let groups = Arc::clone(&bench.stores.groups);
            tasks.spawn(async move {
                groups.create(direct(creator, 10 + n, other)).await.expect("create")
            });
        }
        let outcomes = tasks.join_all().await;
        let ids: BTreeSet<_> = outcomes
            .iter()
            .map(|outcome| match outcome {
                Ok(Creation::Created(id) | Creation::Existed(id)) => *id,
                Err(refusal) => panic!("{refusal:?}"),
            })
            .collect();
        assert_eq!(ids.len(), 1, "{outcomes:?}");
        let created = outcomes.iter().filter(|outcome| matches!(outcome, Ok(Creation::Created(_))));
        assert_eq!(created.count(), 1);
    }
}

pub async fn a_direct_group_gets_back_the_member_who_left(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.person(1).await, bench.person(2).await);
    let Ok(Creation::Created(id)) = bench.create(direct(alice, 1, bob)).await else {
        panic!("a new group")
    };
    let left = bench.groups().remove_member(id, bob.account, bob.identity).await;
    assert_eq!(left.expect("remove"), Ok(()));
    assert_eq!(bench.create(direct(bob, 2, alice)).await, Ok(Creation::Existed(id)));
    let view = bench.groups().members(id, bob.account, FIRST_PAGE).await.expect("members");
    assert_eq!(view.expect("a member").members.len(), 2);
}

pub async fn only_admins_change_a_group_and_only_members_see_it(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    let [alice, bob, carol] = people[..] else { panic!("three") };
    let stranger = bench.person(9).await;
    for (actor, refusal) in [(bob, GroupRefusal::NotAdmin), (stranger, GroupRefusal::NotMember)] {
        assert_eq!(bench.add(actor, &[stranger]).await, Err(refusal));
        assert_eq!(bench.remove(actor, carol).await, Err(refusal));
        let change = MetadataChange { name: Some("mine".into()), ..MetadataChange::default() };
        assert_eq!(bench.update(actor, change).await, Err(refusal));
    }
    assert_eq!(bench.view(stranger).await, Err(GroupRefusal::NotMember));
    assert_eq!(bench.info(stranger).await, Err(GroupRefusal::NotMember));
    let sent = bench.send_to_group(to_others(stranger, "spam")).await;
    assert_eq!(sent, Err(GroupRefusal::NotMember));
    assert_eq!(bench.remove(bob, bob).await, Ok(()), "anyone may leave");
    assert_eq!(bench.remove(bob, bob).await, Ok(()), "and repeat that");
    assert_eq!(bench.view(bob).await, Err(GroupRefusal::NotMember));
    assert_eq!(bench.remove(alice, bob).await, Ok(()), "no member, no change");
    assert_eq!(bench.roles(alice).await, [named(1, Role::Admin), named(3, Role::Member)]);
}

pub async fn there_is_no_group_without_its_creation(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.person(1).await;
    let none = Err(GroupRefusal::NotFound);
    assert_eq!(bench.add(alice, &[alice]).await, none);
    assert_eq!(bench.remove(alice, alice).await, Err(GroupRefusal::NotFound));
    assert_eq!(bench.update(alice, MetadataChange::default()).await, Err(GroupRefusal::NotFound));
    assert_eq!(bench.view(alice).await, Err(GroupRefusal::NotFound));
    assert_eq!(bench.info(alice).await, Err(GroupRefusal::NotFound));
    for message in
        [to_others(alice, "a"), commit(alice, "a", 0), commit(alice, "a", 0).to(&[alice])]
    {
        assert_eq!(bench.send_to_group(message).await, Err(GroupRefusal::NotFound));
    }
}

pub async fn members_are_added_once_and_all_or_none(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    let (carol, dave) = (bench.person(3).await, bench.person(4).await);
    let nobody = Person { identity: IdentityKey::new([99; 32]), ..dave };
    let refused = Err(GroupRefusal::NoSuchAccount(nobody.identity));
    assert_eq!(bench.add(people[0], &[carol, nobody]).await, refused);
    assert_eq!(bench.add(people[0], &[carol, people[1], dave, carol]).await, Ok(2));
    assert_eq!(bench.add(people[0], &[carol]).await, Ok(0));
    bench.crash().await;
    let roles = bench.roles(dave).await;
    assert_eq!(roles.len(), 4);
    assert_eq!(roles[0], named(1, Role::Admin));
}

pub async fn the_oldest_member_follows_the_last_admin(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    assert_eq!(bench.remove(people[0], people[0]).await, Ok(()));
    assert_eq!(bench.roles(people[2]).await, [named(2, Role::Admin), named(3, Role::Member)]);
    assert_eq!(bench.add(people[1], &[people[0]]).await, Ok(1));
    assert_eq!(bench.remove(people[1], people[2]).await, Ok(()));
    assert_eq!(bench.remove(people[1], people[1]).await, Ok(()));
    assert_eq!(bench.roles(people[0]).await, [named(1, Role::Admin)]);
}

pub async fn a_group_goes_with_its_last_member(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    for person in &people {
        assert_eq!(bench.remove(*person, *person).await, Ok(()));
    }
    assert_eq!(bench.view(people[0]).await, Err(GroupRefusal::NotFound));
    let stranger = bench.person(9).await;
    assert_eq!(bench.create(new_group(stranger, &[])).await, Ok(Creation::Created(G)));
    assert_eq!(bench.roles(stranger).await, [named(9, Role::Admin)]);
}

pub async fn metadata_changes_field_by_field_with_a_version(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    let rename = MetadataChange { name: Some("best friends".into()), ..MetadataChange::default() };
    assert_eq!(bench.update(people[0], rename.clone()).await, Ok(1));
    let settings = MetadataChange {
        settings: Some(Bytes::from_static(b"dark")),
        expected_version: Some(1),
        ..MetadataChange::default()
    };
    assert_eq!(bench.update(people[0], settings.clone()).await, Ok(2));
    assert_eq!(bench.update(people[0], settings).await, Err(GroupRefusal::StaleVersion(2)));
    bench.crash().await;
    let view = bench.view(people[1]).await.expect("a member");
    assert_eq!((&*view.name, &*view.description, view.version), ("best friends", "of alice", 2));
    assert_eq!(&view.settings[..], b"dark");
}

pub async fn of_concurrent_changes_with_one_version_one_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(1).await;
    let mut tasks = JoinSet::new();
    for n in 0..8 {
        let (groups, actor) = (Arc::clone(&bench.stores.groups), people[0].account);
        tasks.spawn(async move {
            let change = MetadataChange {
                name: Some(n.to_string()),
                expected_version: Some(0),
                ..MetadataChange::default()
            };
            groups.update(G, actor, change).await.expect("update")
        });
    }
    let outcomes = tasks.join_all().await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Ok(1)).count(), 1, "{outcomes:?}");
    let lost = outcomes.iter().filter(|outcome| **outcome == Err(GroupRefusal::StaleVersion(1)));
    assert_eq!(lost.count(), 7);
}

pub async fn a_list_of_members_is_read_page_by_page(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(7).await;
    let (mut after, mut sizes, mut names) = (0, Vec::new(), Vec::new());
    loop {
        let page = MemberPage { after, limit: 3 };
        let view = bench.groups().members(G, people[3].account, page).await.expect("members");
        let view = view.expect("a member");
        sizes.push(view.members.len());
        names.extend(view.members.into_iter().map(|member| member.username));
        // A member who leaves meanwhile shifts no page.
        if after == 0 {
            bench.remove(people[0], people[1]).await.expect("removed");
        }
        let Some(next) = view.next else { break };
        after = next;
    }
    assert_eq!(sizes, [3, 3, 1]);
    assert_eq!(names, (1..=7).map(|n| format!("person{n}")).collect::<Vec<_>>());
}

pub async fn a_message_to_a_group_is_in_its_channel_of_every_other_member(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    let stranger = bench.person(9).await;
    assert_eq!(bench.announce(to_others(people[1], "hello")).await, 0);
    bench.crash().await;
    for person in [people[0], people[2]] {
        let page = bench.peek(all(person)).await;
        assert_eq!(seqs(&page), [1]);
        let envelope = &page.envelopes[0];
        assert_eq!((envelope.channel, &envelope.payload[..]), (G.into(), &b"hello"[..]));
        assert_eq!(bench.peek(only(person, 0)).await.envelopes, []);
    }
    for person in [people[1], stranger] {
        assert_eq!(bench.peek(all(person)).await.envelopes, []);
    }
    let to_all = GroupMessage { recipients: GroupRecipients::All, ..to_others(people[1], "all") };
    assert_eq!(bench.announce(to_all).await, 0);
    assert_eq!(bench.waiting(all(people[1])).await, ["all"]);
}

pub async fn the_senders_other_devices_get_its_message(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    let from = |n| GroupMessage { sender_device: Some(device_id(n)), ..to_others(people[0], "hi") };
    bench.device(people[0], 1).await;
    bench.announce(from(1)).await;
    assert_eq!(bench.waiting(of_device(people[0], 1)).await, [""; 0]);
    bench.device(people[0], 2).await;
    bench.announce(from(1)).await;
    for n in [1, 2] {
        assert_eq!(bench.waiting(of_device(people[0], n)).await, ["hi"]);
    }
    assert_eq!(bench.waiting(all(people[1])).await, ["hi", "hi"]);
}

pub async fn full_inboxes_are_skipped_and_counted(factory: &dyn Factory) {
    let limits = DeliveryLimits { max_messages: 2, sender_share: 1, ..DeliveryLimits::default() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let people = bench.group(3).await;
    bench.deliver_all(people[0], people[1], &["a", "b"]).await;
    let sent = bench.send_to_group(commit(people[0], "c", 0)).await.expect("accepted");
    assert_eq!((sent.epoch, sent.skipped, sent.is_repeat), (1, 1, false));
    assert_eq!(sent.recipients, 2);
    assert_eq!(bench.waiting(all(people[1])).await, ["a", "b"]);
    assert_eq!(bench.waiting(all(people[2])).await, ["c"]);
    let listed = commit(people[0], "d", 1).to(&[people[1], people[2]]);
    let sent = bench.send_to_group(listed).await.expect("accepted");
    assert_eq!(sent.epoch, 2);
    let [Enqueued::QueueFull, Enqueued::Accepted(receipt)] = sent.outcomes[..] else {
        panic!("{:?}", sent.outcomes)
    };
    assert_eq!(receipt.seq, Seq(2));
}

pub async fn a_repeated_message_to_a_group_is_stored_once(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    let sent = to_others(people[0], "hello").with_id(5);
    bench.announce(sent.clone()).await;
    let again = bench.send_to_group(sent.clone()).await.expect("accepted");
    assert!(again.is_repeat);
    assert_eq!(bench.waiting(all(people[1])).await, ["hello"]);
    // A member that is added since gets the repeat.
    let dave = bench.person(4).await;
    bench.add(people[0], &[dave]).await.expect("added");
    let again = bench.send_to_group(sent).await.expect("accepted");
    assert!(!again.is_repeat);
    assert_eq!(bench.waiting(all(dave)).await, ["hello"]);
    assert_eq!(bench.waiting(all(people[2])).await, ["hello"]);
}

pub async fn a_commit_raises_the_epoch_and_replaces_the_group_info(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    assert_eq!(bench.announce(commit(people[1], "one", 0).with_info("info 1")).await, 1);
    bench.crash().await;
    assert_eq!(bench.info(people[0]).await, Ok((Some(Bytes::from_static(b"info 1")), 1)));
    assert_eq!(bench.announce(commit(people[0], "two", 1)).await, 2);
    let info = bench.info(people[0]).await.expect("a member");
    assert_eq!(info, (Some(Bytes::from_static(b"info 1")), 2), "the last one that there was");
    assert_eq!(bench.view(people[0]).await.expect("a member").epoch, 2);
    assert_eq!(bench.waiting(all(people[0])).await, ["one"]);
    assert_eq!(bench.waiting(all(people[1])).await, ["two"]);
}

pub async fn a_commit_for_another_epoch_stores_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(2).await;
    bench.announce(commit(people[0], "one", 0).with_info("info 1")).await;
    for epoch in [0, 2, u64::MAX] {
        for stale in [
            commit(people[1], "late", epoch).with_info("bad").with_id(1),
            commit(people[1], "late", epoch).to(&people),
        ] {
            assert_eq!(bench.send_to_group(stale).await, Err(GroupRefusal::StaleEpoch(1)));
        }
    }
    assert_eq!(bench.waiting(all(people[0])).await, [""; 0]);
    assert_eq!(bench.waiting(all(people[1])).await, ["one"]);
    assert_eq!(bench.info(people[0]).await, Ok((Some(Bytes::from_static(b"info 1")), 1)));
}

pub async fn of_concurrent_commits_for_one_epoch_one_wins(factory: &dyn Factory) {
    const ROUNDS: u64 = 5;
    let bench = Bench::new(factory).await;
    let people = bench.group(6).await;
    for epoch in 0..ROUNDS {
        let mut tasks = JoinSet::new();
        for (n, sender) in people.iter().copied().enumerate() {
            let groups = Arc::clone(&bench.stores.groups);
            let message = commit(sender, &format!("{epoch} of {}", n + 1), epoch);
            tasks.spawn(async move { (n + 1, groups.send(message).await.expect("send")) });
        }
        let outcomes = tasks.join_all().await;
        let won: Vec<_> =
            outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).map(|(n, _)| *n).collect();
        let [winner] = won[..] else { panic!("{outcomes:?}") };
        for (_, outcome) in outcomes.iter().filter(|(n, _)| *n != winner) {
            assert_eq!(*outcome, Err(GroupRefusal::StaleEpoch(epoch + 1)));
        }
        for (n, person) in people.iter().enumerate() {
            let expected: &[String] =
                if n + 1 == winner { &[] } else { &[format!("{epoch} of {winner}")] };
            assert_eq!(bench.drain(all(*person)).await, expected);
        }
    }
}

pub async fn a_repeat_of_a_commit_that_won_has_its_result(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    let sent = commit(people[0], "one", 0).to(&[people[1], people[2]]).with_id(1);
    let first = bench.send_to_group(sent.clone()).await.expect("accepted");
    let all_members = commit(people[1], "two", 1).with_id(2);
    let second = bench.send_to_group(all_members.clone()).await.expect("accepted");
    // Everything that it led to may be read and gone.
    for person in &people {
        bench.drain(all(*person)).await;
    }
    bench.crash().await;
    let again = bench.send_to_group(sent.clone().at(NOW.plus(MINUTE))).await.expect("accepted");
    assert!(again.is_repeat);
    assert_eq!(again.epoch, first.epoch);
    let receipts = |sent: &GroupSent| -> Vec<_> {
        sent.outcomes
            .iter()
            .map(|outcome| match outcome {
                Enqueued::Accepted(receipt) | Enqueued::Duplicate(receipt) => *receipt,
                other => panic!("{other:?}"),
            })
            .collect()
    };
    assert_eq!(receipts(&again), receipts(&first));
    let again = bench.send_to_group(all_members).await.expect("accepted");
    assert_eq!((again.epoch, again.is_repeat), (second.epoch, true));
    for person in &people {
        assert_eq!(bench.waiting(all(*person)).await, [""; 0], "nothing was stored again");
    }
    let by_another =
        GroupMessage { sender: people[1].account, sender_key: people[1].identity, ..sent };
    assert_eq!(bench.send_to_group(by_another).await, Err(GroupRefusal::StaleEpoch(2)));
}

/// In each inbox a commit precedes everything of the epoch that it leads to.
pub async fn no_message_of_an_epoch_precedes_its_commit(factory: &dyn Factory) {
    const EPOCHS: u64 = 12;
    let bench = Bench::new(factory).await;
    let people = bench.group(3).await;
    let mut tasks = JoinSet::new();
    for sender in people.iter().copied() {
        let stores: Stores = bench.stores.clone();
        tasks.spawn(async move {
            loop {
                // A member sends for the epoch that it knows of, and tries to begin the next one.
                let info = stores.groups.info(G, sender.account).await.expect("info");
                let epoch = info.expect("a member").epoch;
                if epoch >= EPOCHS {
                    return;
                }
                let text = GroupMessage {
                    recipients: GroupRecipients::All,
                    ..to_others(sender, &format!("m{epoch}"))
                };
                stores.groups.send(text).await.expect("send").expect("accepted");
                let next = GroupMessage {
                    recipients: GroupRecipients::All,
                    ..commit(sender, &format!("c{}", epoch + 1), epoch)
                };
                match stores.groups.send(next).await.expect("send") {
                    Ok(_) | Err(GroupRefusal::StaleEpoch(_)) => {}
                    Err(refusal) => panic!("{refusal:?}"),
                }
            }
        });
    }
    tasks.join_all().await;
    for person in &people {
        let mut epoch = 0;
        for text in bench.waiting(all(*person)).await {
            let n: u64 = text[1..].parse().expect("a number");
            if text.starts_with('c') {
                assert_eq!(n, epoch + 1, "each commit once and in order");
                epoch = n;
            } else {
                assert!(n <= epoch, "a message of epoch {n} before its commit");
            }
        }
        assert_eq!(epoch, EPOCHS);
    }
}

pub async fn a_payload_of_any_size_reaches_all_members_unchanged(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let people = bench.group(6).await;
    for (n, size) in [0, 1, 511, 512, 513, 4_096, 100_000].into_iter().enumerate() {
        let payload: Bytes = (0..size).map(|i: u32| (i % 251) as u8).collect::<Vec<_>>().into();
        let sent = GroupMessage { payload: payload.clone(), ..to_others(people[0], "") };
        bench.announce(sent).await;
        if n == 3 {
            bench.crash().await;
        }
        for person in &people[1..] {
            let lease = bench.lease(all(*person), super::bench::EVERYTHING).await;
            let got: Vec<_> = lease.page().envelopes.iter().map(|e| e.payload.clone()).collect();
            assert!(got == [payload.clone()], "{size} bytes");
            lease.complete(NOW).await.expect("complete");
        }
    }
    // Each inbox counts the whole payload, and gives back as much.
    let limits = DeliveryLimits { max_bytes: 5_000, sender_share: 1, ..DeliveryLimits::default() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let people = bench.group(6).await;
    let large = || GroupMessage { payload: vec![7; 3_000].into(), ..to_others(people[0], "") };
    for _ in 0..3 {
        bench.announce(large()).await;
        let sent = bench.send_to_group(large()).await.expect("accepted");
        assert_eq!(sent.skipped, 5);
        for person in &people[1..] {
            assert_eq!(bench.ack(all(*person), Some(u64::MAX), &[]).await, 1);
        }
    }
}

pub async fn a_group_has_no_more_than_the_maximum_of_members(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let people = bench.group(1).await;
    let too_many = (0..=MAX_MEMBERS as u32)
        .map(|n| {
            let mut key = [0xab; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            IdentityKey::new(key)
        })
        .collect();
    let added = bench.groups().add_members(G, people[0].account, too_many, NOW).await;
    assert_eq!(added.expect("add"), Err(GroupRefusal::Full));
}
