//! Groups (400, 410 to 415), commits and messages to all members (205).

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message as _;
use qpq_proto::{
    ROTATION_PREFIX, Status, methods,
    v1::{
        AddMembersRequest, BatchEnqueueRequest, BatchEnqueueResponse, CreateChannelRequest,
        CreateChannelResponse, ErrorDetail, FetchGroupInfoRequest, FetchGroupInfoResponse,
        GroupMember, ListGroupMembersRequest, ListGroupMembersResponse, PeekRequest,
        RemoveMemberRequest, RotateKeysRequest, RotationRequest, UpdateGroupMetadataRequest,
        UpdateGroupMetadataResponse,
    },
};

use crate::{
    harness::{Refused, Server, User, new_identity},
    user::message,
};

const GROUP: Bytes = Bytes::from_static(&[0xee; 16]);

fn keys(users: &[&User]) -> Vec<Bytes> {
    users.iter().map(|user| user.key()).collect()
}

/// Returns the request that creates the group of these tests.
fn creation(members: &[&User]) -> CreateChannelRequest {
    CreateChannelRequest {
        member_keys: keys(members),
        name: "friends".into(),
        channel_id: GROUP,
        ..Default::default()
    }
}

fn to_members(payload: &'static [u8]) -> BatchEnqueueRequest {
    BatchEnqueueRequest {
        payload: payload.into(),
        channel_id: GROUP,
        to_members: true,
        ..Default::default()
    }
}

fn commit(payload: &'static [u8], expected_epoch: u64) -> BatchEnqueueRequest {
    BatchEnqueueRequest { commit: true, expected_epoch, ..to_members(payload) }
}

/// Returns a commit for listed recipients.
fn listed(payload: &'static [u8], epoch: u64, recipients: &[&User]) -> BatchEnqueueRequest {
    BatchEnqueueRequest {
        to_members: false,
        recipient_keys: keys(recipients),
        ..commit(payload, epoch)
    }
}

impl User {
    async fn create(&self, request: CreateChannelRequest) -> CreateChannelResponse {
        self.ok::<methods::CreateChannel>(request).await
    }

    async fn members(
        &self,
        limit: u32,
        cursor: Bytes,
    ) -> Result<ListGroupMembersResponse, Refused> {
        let request =
            ListGroupMembersRequest { channel_id: GROUP, limit, cursor, ..Default::default() };
        Ok(self.ask::<methods::ListGroupMembers>(request).await?.response)
    }

    async fn remove(&self, member: &Self) -> Result<(), Refused> {
        let request = RemoveMemberRequest {
            channel_id: GROUP,
            member_key: member.key(),
            ..Default::default()
        };
        self.ask::<methods::RemoveMember>(request).await.map(|answer| {
            assert!(answer.response.success);
        })
    }

    async fn add(&self, members: &[&Self]) -> Result<u32, Refused> {
        let request = AddMembersRequest {
            channel_id: GROUP,
            member_keys: keys(members),
            ..Default::default()
        };
        Ok(self.ask::<methods::AddMembers>(request).await?.response.added)
    }

    async fn promote(&self, members: &[&Self]) -> Result<u32, Refused> {
        let request = AddMembersRequest {
            channel_id: GROUP,
            member_keys: keys(members),
            admins: true,
            ..Default::default()
        };
        Ok(self.ask::<methods::AddMembers>(request).await?.response.added)
    }

    async fn update(
        &self,
        change: UpdateGroupMetadataRequest,
    ) -> Result<UpdateGroupMetadataResponse, Refused> {
        let request = UpdateGroupMetadataRequest { channel_id: GROUP, ..change };
        Ok(self.ask::<methods::UpdateGroupMetadata>(request).await?.response)
    }

    async fn info(&self) -> Result<FetchGroupInfoResponse, Refused> {
        let request = FetchGroupInfoRequest { channel_id: GROUP, ..Default::default() };
        Ok(self.ask::<methods::FetchGroupInfo>(request).await?.response)
    }

    async fn batch(&self, request: BatchEnqueueRequest) -> BatchEnqueueResponse {
        self.ok::<methods::BatchEnqueue>(request).await
    }

    /// Returns the payloads of the group's channel.
    async fn inbox(&self) -> Vec<Bytes> {
        let request = PeekRequest { channel_id: GROUP, ..Default::default() };
        let page = self.ok::<methods::Peek>(request).await;
        page.payloads.into_iter().map(|envelope| envelope.data).collect()
    }
}

/// Starts a server with a group of three members: alice, who is its admin, bob and carol.
async fn group() -> (Server, [User; 3]) {
    let server = Server::start().await;
    let users = [server.user("alice").await, server.user("bob").await, server.user("carol").await];
    let created = users[0].create(creation(&[&users[1], &users[2]])).await;
    assert_eq!(created, CreateChannelResponse { channel_id: GROUP, was_new: true });
    (server, users)
}

fn role_of(members: &[GroupMember]) -> Vec<(&str, u32)> {
    members.iter().map(|member| (member.username.as_str(), member.role)).collect()
}

#[tokio::test]
async fn a_direct_channel_has_the_same_id_for_both_members() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let with = |peer: &User| CreateChannelRequest { peer_key: peer.key(), ..Default::default() };
    let first = alice.create(with(&bob)).await;
    assert_eq!((first.channel_id.len(), first.was_new), (16, true));
    for repeated in [bob.create(with(&alice)).await, alice.create(with(&bob)).await] {
        assert_eq!((repeated.channel_id, repeated.was_new), (first.channel_id.clone(), false));
    }
    for (request, field) in [
        (with(&alice), "peer_key"),
        (CreateChannelRequest { member_keys: keys(&[&bob]), ..with(&bob) }, "member_keys"),
    ] {
        alice.refused::<methods::CreateChannel>(request).await.assert_field(field);
    }
}

#[tokio::test]
async fn a_group_has_the_members_and_the_metadata_that_it_was_given() {
    let (server, [alice, bob, _carol]) = group().await;
    let view = bob.members(0, Bytes::new()).await.expect("a member");
    assert_eq!(role_of(&view.members), [("alice", 1), ("bob", 0), ("carol", 0)]);
    assert_eq!((view.name.as_str(), view.version, view.epoch), ("friends", 0, 0));
    assert_eq!(view.members[1].identity_key, bob.key());
    assert_eq!(view.members[1].joined_at, crate::harness::START.0);
    assert!(view.next_cursor.is_empty());
    assert!(!alice.create(creation(&[])).await.was_new, "a repeat");
    let mallory = server.user("mallory").await;
    let taken = mallory.refused::<methods::CreateChannel>(creation(&[])).await;
    taken.assert(Status::Forbidden, "group.id_taken");
    let chosen = CreateChannelRequest { channel_id: Bytes::new(), ..creation(&[&bob]) };
    let ids: BTreeSet<_> =
        [alice.create(chosen.clone()).await.channel_id, alice.create(chosen).await.channel_id]
            .into();
    assert_eq!(ids.len(), 2, "the server chooses different ids");
    let nobody = CreateChannelRequest {
        channel_id: Bytes::new(),
        member_keys: vec![Bytes::copy_from_slice(new_identity().as_bytes())],
        ..Default::default()
    };
    let refused = alice.refused::<methods::CreateChannel>(nobody).await;
    refused.assert(Status::NotFound, "group.no_such_account");
}

#[tokio::test]
async fn members_are_listed_in_pages() {
    let (_server, [alice, _bob, _carol]) = group().await;
    let first = alice.members(2, Bytes::new()).await.expect("a member");
    assert_eq!(role_of(&first.members), [("alice", 1), ("bob", 0)]);
    let second = alice.members(2, first.next_cursor).await.expect("a member");
    assert_eq!(role_of(&second.members), [("carol", 0)]);
    assert!(second.next_cursor.is_empty());
    alice.members(1, Bytes::from_static(b"short")).await.expect_err("short").assert_field("cursor");
}

#[tokio::test]
async fn admins_change_members_and_metadata_and_strangers_see_nothing() {
    let (server, [alice, bob, carol]) = group().await;
    let mallory = server.user("mallory").await;
    let rename = || UpdateGroupMetadataRequest { name: Some("mine".into()), ..Default::default() };
    for (user, code) in [(&bob, "group.admin_required"), (&mallory, "group.not_member")] {
        user.add(&[&mallory]).await.expect_err("refused").assert(Status::Forbidden, code);
        user.remove(&carol).await.expect_err("refused").assert(Status::Forbidden, code);
        user.update(rename()).await.expect_err("refused").assert(Status::Forbidden, code);
    }
    let refused = mallory.members(0, Bytes::new()).await.expect_err("refused");
    refused.assert(Status::Forbidden, "group.not_member");
    mallory.info().await.expect_err("refused").assert(Status::Forbidden, "group.not_member");
    let refused = mallory.refused::<methods::BatchEnqueue>(to_members(b"spam")).await;
    refused.assert(Status::Forbidden, "group.not_member");
    assert_eq!(alice.add(&[&mallory, &bob]).await, Ok(1));
    alice.remove(&mallory).await.expect("an admin removes");
    bob.remove(&bob).await.expect("a member leaves");
    bob.remove(&bob).await.expect("and repeats that");
    let view = alice.members(0, Bytes::new()).await.expect("a member");
    assert_eq!(role_of(&view.members), [("alice", 1), ("carol", 0)]);
    alice.remove(&alice).await.expect("the last admin leaves");
    let view = carol.members(0, Bytes::new()).await.expect("a member");
    assert_eq!(role_of(&view.members), [("carol", 1)]);
    carol.remove(&carol).await.expect("the last member leaves");
    let refused = carol.members(0, Bytes::new()).await.expect_err("no group");
    refused.assert(Status::NotFound, "group.not_found");
}

#[tokio::test]
async fn an_admin_promotes_members_and_adds_admins() {
    let (server, [alice, bob, carol]) = group().await;
    let (dave, erin) = (server.user("dave").await, server.user("erin").await);
    let refused = bob.promote(&[&bob]).await.expect_err("refused");
    refused.assert(Status::Forbidden, "group.admin_required");
    assert_eq!(alice.promote(&[&bob, &dave]).await, Ok(1), "bob is a member");
    assert_eq!(bob.add(&[&alice, &bob, &erin]).await, Ok(1), "a promoted admin adds members");
    let view = carol.members(0, Bytes::new()).await.expect("a member");
    let roles = [("alice", 1), ("bob", 1), ("carol", 0), ("dave", 1), ("erin", 0)];
    assert_eq!(role_of(&view.members), roles);
}

#[tokio::test]
async fn metadata_is_changed_by_field_and_by_version() {
    let (_server, [alice, bob, _carol]) = group().await;
    let change = UpdateGroupMetadataRequest {
        description: Some("of alice".into()),
        settings: Some(Bytes::from_static(b"dark")),
        ..Default::default()
    };
    let changed = alice.update(change.clone()).await.expect("an admin");
    assert_eq!((changed.success, changed.version), (true, 1));
    let expected = UpdateGroupMetadataRequest { expected_version: 1, ..change.clone() };
    assert_eq!(alice.update(expected.clone()).await.expect("an admin").version, 2);
    let stale = alice.update(expected).await.expect_err("stale");
    stale.assert(Status::Forbidden, "group.stale_version");
    let view = bob.members(0, Bytes::new()).await.expect("a member");
    assert_eq!((view.name.as_str(), view.description.as_str()), ("friends", "of alice"));
    assert_eq!((view.settings, view.version), (Bytes::from_static(b"dark"), 2));
    for (change, field) in [
        (UpdateGroupMetadataRequest { name: Some("x".repeat(257)), ..Default::default() }, "name"),
        (
            UpdateGroupMetadataRequest {
                description: Some("x".repeat(4_097)),
                ..Default::default()
            },
            "description",
        ),
        (
            UpdateGroupMetadataRequest {
                settings: Some(vec![0; 16_385].into()),
                ..Default::default()
            },
            "settings",
        ),
    ] {
        alice.update(change).await.expect_err("too long").assert_field(field);
    }
}

#[tokio::test]
async fn a_message_to_all_members_has_one_result() {
    let (server, [alice, bob, carol]) = group().await;
    let sent = alice.batch(to_members(b"hello")).await;
    let [result] = &sent.results[..] else { panic!("one result") };
    assert_eq!((result.status, result.code.as_str(), result.duplicate), (0, "", false));
    assert!(sent.seqs.is_empty() && result.delivery_proof.is_empty());
    assert_eq!(sent.epoch, 0);
    assert_eq!(bob.inbox().await, [&b"hello"[..]]);
    assert_eq!(carol.inbox().await, [&b"hello"[..]]);
    assert!(alice.inbox().await.is_empty());
    let with_id = BatchEnqueueRequest { message_id: vec![1; 16].into(), ..to_members(b"once") };
    assert!(!bob.batch(with_id.clone()).await.results[0].duplicate);
    assert!(bob.batch(with_id).await.results[0].duplicate);
    assert_eq!(alice.inbox().await, [&b"once"[..]]);
    drop(server);
}

#[tokio::test]
async fn a_full_inbox_makes_the_result_partial() {
    let server = Server::with(|config| {
        config.delivery.max_messages = 1;
        config.delivery.sender_share = 1;
    })
    .await;
    let (alice, bob, carol) =
        (server.user("alice").await, server.user("bob").await, server.user("carol").await);
    alice.create(creation(&[&bob, &carol])).await;
    alice.ok::<methods::Enqueue>(message(&bob, b"fills it")).await;
    let sent = alice.batch(commit(b"new epoch", 0)).await;
    let [result] = &sent.results[..] else { panic!("one result") };
    assert_eq!((result.status, result.code.as_str()), (0, "delivery.partial"));
    assert_eq!(sent.epoch, 1);
    assert_eq!(carol.inbox().await, [&b"new epoch"[..]]);
    assert!(bob.inbox().await.is_empty());
    let sent = alice.batch(listed(b"another", 1, &[&bob, &alice])).await;
    let results: Vec<_> =
        sent.results.iter().map(|result| (result.status, result.code.as_str())).collect();
    assert_eq!(results, [(5, "delivery.queue_full"), (0, "")]);
    assert_eq!((sent.seqs, sent.epoch), (vec![0, 1], 2));
    assert!(!sent.results[1].delivery_proof.is_empty());
}

#[tokio::test]
async fn a_commit_wins_once_for_each_epoch() {
    let (_server, [alice, bob, carol]) = group().await;
    let with_info =
        BatchEnqueueRequest { group_info: Bytes::from_static(b"info"), ..commit(b"one", 0) };
    assert_eq!(bob.batch(with_info).await.epoch, 1);
    for stale in [commit(b"late", 0), commit(b"early", 2), listed(b"late", 0, &[&alice])] {
        let mut payload = stale.encode_to_vec();
        qpq_proto::session::append_session_token(&mut payload, &carol.token);
        let answer = carol.client.raw(205, payload).await;
        let detail = ErrorDetail::from_payload(&answer.payload);
        assert_eq!(answer.status, Status::Forbidden.code());
        assert_eq!((detail.code.as_str(), detail.epoch), ("delivery.stale_epoch", 1));
    }
    assert_eq!(alice.inbox().await, [&b"one"[..]]);
    assert_eq!(carol.inbox().await, [&b"one"[..]]);
    let info = carol.info().await.expect("a member");
    assert_eq!((&info.group_info[..], info.epoch), (&b"info"[..], 1));
    assert_eq!(alice.members(0, Bytes::new()).await.expect("a member").epoch, 1);
}

#[tokio::test]
async fn the_repeat_of_a_commit_that_won_is_answered_as_the_first_time() {
    let (_server, [alice, bob, carol]) = group().await;
    let first = BatchEnqueueRequest {
        message_id: vec![1; 16].into(),
        ..listed(b"one", 0, &[&bob, &carol])
    };
    let sent = alice.batch(first.clone()).await;
    assert_eq!((&sent.seqs[..], sent.epoch), (&[1, 1][..], 1));
    bob.batch(commit(b"two", 1)).await;
    let again = alice.batch(first).await;
    assert_eq!((&again.seqs, again.epoch), (&sent.seqs, 1));
    for (before, now) in sent.results.iter().zip(&again.results) {
        assert!(now.duplicate && !before.duplicate);
        assert_eq!((before.seq, &before.delivery_proof), (now.seq, &now.delivery_proof));
    }
    assert_eq!(carol.inbox().await, [&b"one"[..], b"two"]);
}

#[tokio::test]
async fn a_batch_has_exactly_one_form() {
    let (_server, [alice, bob, _carol]) = group().await;
    let list = vec![message(&bob, b"hello")];
    for request in [
        BatchEnqueueRequest { recipient_keys: keys(&[&bob]), ..to_members(b"x") },
        BatchEnqueueRequest { messages: list.clone(), ..to_members(b"x") },
        BatchEnqueueRequest { messages: list, commit: true, ..Default::default() },
        BatchEnqueueRequest { to_members: false, ..commit(b"x", 0) },
        BatchEnqueueRequest { commit: false, expected_epoch: 1, ..to_members(b"x") },
        BatchEnqueueRequest { group_info: Bytes::from_static(b"x"), ..to_members(b"x") },
        listed(b"x", 0, &[&bob, &bob]),
    ] {
        let refused = alice.refused::<methods::BatchEnqueue>(request).await;
        refused.assert(Status::BadRequest, "delivery.invalid_batch");
    }
    let no_group = BatchEnqueueRequest { channel_id: Bytes::new(), ..to_members(b"x") };
    alice.refused::<methods::BatchEnqueue>(no_group).await.assert_field("channel_id");
    let unknown = BatchEnqueueRequest { channel_id: vec![9; 16].into(), ..to_members(b"x") };
    let refused = alice.refused::<methods::BatchEnqueue>(unknown).await;
    refused.assert(Status::NotFound, "group.not_found");
    let large =
        BatchEnqueueRequest { group_info: vec![0; (1 << 20) + 1].into(), ..commit(b"x", 0) };
    alice.refused::<methods::BatchEnqueue>(large).await.assert_field("group_info");
    assert!(bob.inbox().await.is_empty());
}

#[tokio::test]
async fn a_rotation_is_requested_of_every_member() {
    let (server, [alice, bob, carol]) = group().await;
    let request =
        RotateKeysRequest { channel_id: GROUP, reason: "lost phone".into(), ..Default::default() };
    let rotation = bob.ok::<methods::RotateKeys>(request.clone()).await;
    assert_eq!((rotation.success, rotation.rotation_id.len()), (true, 16));
    for member in [&alice, &bob, &carol] {
        let [payload] = &member.inbox().await[..] else { panic!("one request") };
        assert_eq!(payload[..4], ROTATION_PREFIX);
        let request = RotationRequest::decode(&payload[4..]).expect("a rotation request");
        let expected = RotationRequest {
            rotation_id: rotation.rotation_id.clone(),
            channel_id: GROUP,
            requested_by: bob.key(),
            reason: "lost phone".into(),
            at: crate::harness::START.0,
        };
        assert_eq!(request, expected);
    }
    let mallory = server.user("mallory").await;
    let refused = mallory.refused::<methods::RotateKeys>(request.clone()).await;
    refused.assert(Status::Forbidden, "group.not_member");
    let long = RotateKeysRequest { reason: "x".repeat(1_025), ..request };
    bob.refused::<methods::RotateKeys>(long).await.assert_field("reason");
}

#[tokio::test]
async fn a_message_to_all_members_costs_as_many_messages() {
    let server = Server::with(|config| config.limits.enabled = true).await;
    let users: Vec<User> = {
        let mut users = Vec::new();
        for n in 0..12 {
            users.push(server.user(&format!("user{n}")).await);
        }
        users
    };
    let others: Vec<&User> = users[1..].iter().collect();
    users[0].create(creation(&others)).await;
    let mut sent = 0;
    let refused = loop {
        match users[0].ask::<methods::BatchEnqueue>(to_members(b"x")).await {
            Ok(_) => sent += 1,
            Err(refused) => break refused,
        }
    };
    refused.assert(Status::RateLimited, "rpc.rate_limited");
    let burst = qpq_proto::LimitClass::Send.defaults().iter().map(|limit| limit.burst).min();
    let burst = burst.expect("the class has a budget");
    assert!(sent <= burst / 11 + 1, "{sent} calls to 11 members with a budget of {burst}");
}
