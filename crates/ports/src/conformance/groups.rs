//! Rules of [`crate::Groups`].

mod messages;

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use qpq_domain::{GroupId, IdentityKey, MAX_MEMBERS, MessageId, Pair, Role, UnixMillis};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, NOW, RegisteredAccount, message},
};
use crate::{
    Commit, Creation, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, GroupView, Groups,
    MemberPage, MetadataChange, NewGroup, NewMembers,
};

pub use self::messages::*;

pub(super) const G: GroupId = GroupId::new([0xee; 16]);
const FIRST_PAGE: MemberPage = MemberPage { after: 0, limit: 1_000 };

fn new_group(creator: RegisteredAccount, others: &[RegisteredAccount]) -> NewGroup {
    let others = others.iter().map(|account| account.identity).collect();
    NewGroup {
        id: G,
        creator: creator.account,
        members: NewMembers::Listed(others),
        name: "friends".into(),
        description: "of alice".into(),
        now: NOW,
    }
}

pub(super) fn direct(creator: RegisteredAccount, id: u8, other: RegisteredAccount) -> NewGroup {
    let pair = Pair::new(creator.identity, other.identity).expect("two");
    let members = NewMembers::Direct(pair);
    NewGroup { id: GroupId::new([id; 16]), members, ..new_group(creator, &[]) }
}

/// Creates a message of `sender` to all other members, without a commit.
pub(super) fn to_others(sender: RegisteredAccount, text: &str) -> GroupMessage {
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

pub(super) fn commit(sender: RegisteredAccount, text: &str, epoch: u64) -> GroupMessage {
    let commit = Some(Commit { expected_epoch: epoch, group_info: None });
    GroupMessage { commit, ..to_others(sender, text) }
}

impl GroupMessage {
    pub(super) fn to(self, recipients: &[RegisteredAccount]) -> Self {
        let listed = recipients.iter().map(|account| account.identity).collect();
        Self { recipients: GroupRecipients::Listed(listed), ..self }
    }

    pub(super) fn with_id(self, n: u8) -> Self {
        Self { message_id: Some(MessageId::new([n; 16])), ..self }
    }

    fn with_info(self, info: &'static str) -> Self {
        let commit = self.commit.map(|commit| Commit { group_info: Some(info.into()), ..commit });
        Self { commit, ..self }
    }

    pub(super) fn at(self, now: UnixMillis) -> Self {
        Self { now, ..self }
    }
}

impl Bench {
    fn groups(&self) -> &dyn Groups {
        &*self.stores.groups
    }

    /// Registers this many accounts and creates a group of them; the first one is the admin.
    pub(super) async fn group(&self, count: u8) -> Vec<RegisteredAccount> {
        let mut accounts = Vec::new();
        for n in 1..=count {
            accounts.push(self.account(n).await);
        }
        let created = self.create(new_group(accounts[0], &accounts[1..])).await;
        assert_eq!(created, Ok(Creation::Created(G)));
        accounts
    }

    pub(super) async fn create(&self, group: NewGroup) -> Result<Creation, GroupRefusal> {
        self.groups().create(group).await.expect("create")
    }

    pub(super) async fn add(
        &self,
        actor: RegisteredAccount,
        members: &[RegisteredAccount],
    ) -> Result<u32, GroupRefusal> {
        self.add_as(Role::Member, actor, members).await
    }

    async fn add_as(
        &self,
        role: Role,
        actor: RegisteredAccount,
        members: &[RegisteredAccount],
    ) -> Result<u32, GroupRefusal> {
        let members = members.iter().map(|account| account.identity).collect();
        self.groups().add_members(G, actor.account, members, role, NOW).await.expect("add")
    }

    async fn remove(
        &self,
        actor: RegisteredAccount,
        member: RegisteredAccount,
    ) -> Result<(), GroupRefusal> {
        self.groups().remove_member(G, actor.account, member.identity).await.expect("remove")
    }

    async fn view(&self, viewer: RegisteredAccount) -> Result<GroupView, GroupRefusal> {
        self.groups().members(G, viewer.account, FIRST_PAGE).await.expect("members")
    }

    /// Returns the members and their roles, as listed for a member.
    pub(super) async fn roles(&self, viewer: RegisteredAccount) -> Vec<(String, Role)> {
        let view = self.view(viewer).await.expect("a member");
        view.members.into_iter().map(|member| (member.username, member.role)).collect()
    }

    async fn update(
        &self,
        actor: RegisteredAccount,
        change: MetadataChange,
    ) -> Result<u64, GroupRefusal> {
        self.groups().update(G, actor.account, change).await.expect("update")
    }

    async fn info(&self, viewer: RegisteredAccount) -> Result<(Option<Bytes>, u64), GroupRefusal> {
        let info = self.groups().info(G, viewer.account).await.expect("info");
        info.map(|info| (info.group_info, info.epoch))
    }

    pub(super) async fn send_to_group(
        &self,
        message: GroupMessage,
    ) -> Result<GroupSent, GroupRefusal> {
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
    (format!("account{n}"), role)
}

pub async fn a_group_is_as_it_was_created(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    bench.crash().await;
    let view = bench.view(accounts[2]).await.expect("a member");
    assert_eq!((&*view.name, &*view.description), ("friends", "of alice"));
    assert_eq!((view.version, view.epoch, view.next), (0, 0, None));
    assert!(view.settings.is_empty());
    assert!(view.members.iter().all(|member| member.joined_at == NOW));
    assert_eq!(view.members[1].identity, accounts[1].identity);
    let roles = [named(1, Role::Admin), named(2, Role::Member), named(3, Role::Member)];
    assert_eq!(bench.roles(accounts[0]).await, roles);
    assert_eq!(bench.info(accounts[1]).await, Ok((None, 0)));
}

pub async fn a_repeated_creation_returns_the_group(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let stranger = bench.account(9).await;
    let again = NewGroup { name: "other".into(), ..new_group(accounts[0], &[stranger]) };
    assert_eq!(bench.create(again).await, Ok(Creation::Existed(G)));
    assert_eq!(bench.create(new_group(accounts[1], &[])).await, Ok(Creation::Existed(G)));
    assert_eq!(bench.create(new_group(stranger, &[])).await, Err(GroupRefusal::IdTaken));
    let view = bench.view(accounts[0]).await.expect("a member");
    assert_eq!((&*view.name, view.members.len()), ("friends", 2));
}

pub async fn a_creation_with_an_unknown_member_creates_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let nobody = RegisteredAccount { identity: IdentityKey::new([9; 32]), ..bob };
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
        let (alice, bob) = (bench.account(1).await, bench.account(2).await);
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
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
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
    let accounts = bench.group(3).await;
    let [alice, bob, carol] = accounts[..] else { panic!("three") };
    let stranger = bench.account(9).await;
    for (actor, refusal) in [(bob, GroupRefusal::NotAdmin), (stranger, GroupRefusal::NotMember)] {
        for role in [Role::Member, Role::Admin] {
            assert_eq!(bench.add_as(role, actor, &[actor, stranger]).await, Err(refusal));
        }
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
    let alice = bench.account(1).await;
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
    let accounts = bench.group(2).await;
    let (carol, dave) = (bench.account(3).await, bench.account(4).await);
    let nobody = RegisteredAccount { identity: IdentityKey::new([99; 32]), ..dave };
    let refused = Err(GroupRefusal::NoSuchAccount(nobody.identity));
    assert_eq!(bench.add(accounts[0], &[carol, nobody]).await, refused);
    assert_eq!(bench.add(accounts[0], &[carol, accounts[1], dave, carol]).await, Ok(2));
    assert_eq!(bench.add(accounts[0], &[carol]).await, Ok(0));
    bench.crash().await;
    let roles = bench.roles(dave).await;
    assert_eq!(roles.len(), 4);
    assert_eq!(roles[0], named(1, Role::Admin));
}

pub async fn listed_members_become_admins_and_stay_admins(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let [alice, bob, _] = accounts[..] else { panic!("three") };
    let (dave, eve) = (bench.account(4).await, bench.account(5).await);
    assert_eq!(bench.add_as(Role::Admin, alice, &[bob, dave]).await, Ok(1), "bob is a member");
    let mut expected = vec![
        named(1, Role::Admin),
        named(2, Role::Admin),
        named(3, Role::Member),
        named(4, Role::Admin),
    ];
    assert_eq!(bench.roles(dave).await, expected);
    for admin in [bob, dave] {
        assert_eq!(bench.add_as(Role::Member, admin, &[alice, bob, dave, eve]).await.err(), None);
    }
    expected.push(named(5, Role::Member));
    assert_eq!(bench.add_as(Role::Admin, alice, &[bob]).await, Ok(0), "a repeat");
    bench.crash().await;
    assert_eq!(bench.roles(eve).await, expected);
    // With another admin in the group, no member becomes admin.
    assert_eq!(bench.remove(alice, alice).await, Ok(()));
    assert_eq!(bench.roles(bob).await, expected[1..]);
}

pub async fn a_refused_addition_promotes_no_member(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let nobody = RegisteredAccount { identity: IdentityKey::new([99; 32]), ..accounts[1] };
    let refused = bench.add_as(Role::Admin, accounts[0], &[accounts[1], nobody]).await;
    assert_eq!(refused, Err(GroupRefusal::NoSuchAccount(nobody.identity)));
    assert_eq!(bench.roles(accounts[0]).await[1], named(2, Role::Member));
}

pub async fn the_oldest_member_follows_the_last_admin(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    assert_eq!(bench.remove(accounts[0], accounts[0]).await, Ok(()));
    assert_eq!(bench.roles(accounts[2]).await, [named(2, Role::Admin), named(3, Role::Member)]);
    assert_eq!(bench.add(accounts[1], &[accounts[0]]).await, Ok(1));
    assert_eq!(bench.remove(accounts[1], accounts[2]).await, Ok(()));
    assert_eq!(bench.remove(accounts[1], accounts[1]).await, Ok(()));
    assert_eq!(bench.roles(accounts[0]).await, [named(1, Role::Admin)]);
}

pub async fn a_group_is_removed_with_its_last_member(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    for account in &accounts {
        assert_eq!(bench.remove(*account, *account).await, Ok(()));
    }
    assert_eq!(bench.view(accounts[0]).await, Err(GroupRefusal::NotFound));
    let stranger = bench.account(9).await;
    assert_eq!(bench.create(new_group(stranger, &[])).await, Ok(Creation::Created(G)));
    assert_eq!(bench.roles(stranger).await, [named(9, Role::Admin)]);
}

pub async fn metadata_changes_field_by_field_with_a_version(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let rename = MetadataChange { name: Some("best friends".into()), ..MetadataChange::default() };
    assert_eq!(bench.update(accounts[0], rename.clone()).await, Ok(1));
    let settings = MetadataChange {
        settings: Some(Bytes::from_static(b"dark")),
        expected_version: Some(1),
        ..MetadataChange::default()
    };
    assert_eq!(bench.update(accounts[0], settings.clone()).await, Ok(2));
    assert_eq!(bench.update(accounts[0], settings).await, Err(GroupRefusal::StaleVersion(2)));
    bench.crash().await;
    let view = bench.view(accounts[1]).await.expect("a member");
    assert_eq!((&*view.name, &*view.description, view.version), ("best friends", "of alice", 2));
    assert_eq!(&view.settings[..], b"dark");
}

pub async fn of_concurrent_changes_with_one_version_one_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(1).await;
    let mut tasks = JoinSet::new();
    for n in 0..8 {
        let (groups, actor) = (Arc::clone(&bench.stores.groups), accounts[0].account);
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
    let accounts = bench.group(7).await;
    let (mut after, mut sizes, mut names) = (0, Vec::new(), Vec::new());
    loop {
        let page = MemberPage { after, limit: 3 };
        let view = bench.groups().members(G, accounts[3].account, page).await.expect("members");
        let view = view.expect("a member");
        sizes.push(view.members.len());
        names.extend(view.members.into_iter().map(|member| member.username));
        // A member who leaves between two pages does not shift the members of either page.
        if after == 0 {
            bench.remove(accounts[0], accounts[1]).await.expect("removed");
        }
        let Some(next) = view.next else { break };
        after = next;
    }
    assert_eq!(sizes, [3, 3, 1]);
    assert_eq!(names, (1..=7).map(|n| format!("account{n}")).collect::<Vec<_>>());
}

pub async fn a_group_has_no_more_than_the_maximum_of_members(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(1).await;
    let too_many = (0..=MAX_MEMBERS as u32)
        .map(|n| {
            let mut key = [0xab; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            IdentityKey::new(key)
        })
        .collect();
    let added =
        bench.groups().add_members(G, accounts[0].account, too_many, Role::Member, NOW).await;
    assert_eq!(added.expect("add"), Err(GroupRefusal::Full));
}
