//! Rules of [`Accounts::delete`](crate::Accounts::delete) and
//! [`Accounts::erase`](crate::Accounts::erase).

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use qpq_domain::{
    AccountId, BlobId, DeviceKey, GroupId, IdentityKey, InviteHash, MessageId, Pair, Role, Seq,
    TokenHash, UnixMillis, Username,
};
use tokio::task::JoinSet;

pub use super::bench::run_job;
use super::{
    Factory,
    bench::{
        Bench, EVERYTHING, MINUTE, NOW, RegisteredAccount, all, device, device_id, first, message,
        new_account, of_device,
    },
    maintenance::sweep_all,
};
use crate::{
    Ack, AtRestKeyId, BanScope, Batch, BlobFinish, BlobOwner, Blocking, BundlePut, CALLS_ENDED,
    CertifiedKey, ClaimRequest, Commit, Deletion, DeviceRegistration, ERASE, Endpoint, Enqueued,
    Erasing, ErasureId, GroupMessage, GroupRecipients, GroupRefusal, HybridKey, MemberPage,
    ModerationRight, Moderator, NAME_RESERVED, NewAccount, NewBan, NewBundle, NewChunk, NewDevice,
    NewGroup, NewInvite, NewKeyPackage, NewMembers, NewMessage, NewReport, NewSession,
    PackageOwner, Registration, Session, SessionCreation, Stores, UploadMode,
};

/// The instant after which all calls that began before a deletion at [`NOW`] have ended.
const LATER: UnixMillis = UnixMillis(NOW.0 + CALLS_ENDED.as_millis() as u64 + 1_000);

impl Bench {
    async fn delete(&self, account: RegisteredAccount) -> ErasureId {
        delete(&self.stores, account.account, NOW).await
    }

    /// Runs the erasure at `now` until it waits or is done.
    async fn erase(&self, erasure: ErasureId, now: UnixMillis) -> Erasing {
        pass(&self.stores, erasure, now).await
    }

    async fn create_session(&self, owner: RegisteredAccount, n: u8) -> SessionCreation {
        let session = NewSession { token: TokenHash::new([n; 32]), session: session(owner) };
        self.stores.sessions.create(session).await.expect("create")
    }

    async fn create_group(&self, n: u8, creator: RegisteredAccount, others: &[RegisteredAccount]) {
        create_group(&self.stores, n, creator, others).await;
    }

    async fn members(&self, n: u8, viewer: RegisteredAccount) -> Vec<(IdentityKey, Role)> {
        let page = MemberPage { after: 0, limit: 100 };
        let view = self.stores.groups.members(group(n), viewer.account, page).await;
        let view = view.expect("read").expect("a member");
        view.members.into_iter().map(|member| (member.identity, member.role)).collect()
    }
}

async fn delete(stores: &Stores, account: AccountId, now: UnixMillis) -> ErasureId {
    match stores.accounts.delete(account, now).await.expect("delete") {
        Deletion::Deleted(erasure) => erasure,
        Deletion::NotFound => panic!("no such account"),
    }
}

async fn pass(stores: &Stores, erasure: ErasureId, now: UnixMillis) -> Erasing {
    loop {
        match stores.accounts.erase(erasure, now).await.expect("erase") {
            Erasing::More => {}
            progress => return progress,
        }
    }
}

fn session(owner: RegisteredAccount) -> Session {
    Session {
        account: owner.account,
        identity: owner.identity,
        device: None,
        authenticated_at: NOW,
        last_used_at: NOW,
        expires_at: NOW.plus(60 * MINUTE),
    }
}

const fn group(n: u8) -> GroupId {
    GroupId::new([n; 16])
}

async fn create_group(
    stores: &Stores,
    n: u8,
    creator: RegisteredAccount,
    others: &[RegisteredAccount],
) {
    let listed = others.iter().map(|account| account.identity).collect();
    let new = NewGroup {
        id: group(n),
        creator: creator.account,
        members: NewMembers::Listed(listed),
        name: "friends".into(),
        description: String::new(),
        now: NOW,
    };
    stores.groups.create(new).await.expect("create").expect("a new group");
}

/// Creates a message of `sender` to all other members of the group.
fn to_group(n: u8, sender: RegisteredAccount, text: &str) -> GroupMessage {
    let one = message(sender, sender, text);
    GroupMessage {
        group: group(n),
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

fn package(n: u8) -> NewKeyPackage {
    NewKeyPackage {
        fingerprint: [n; 32],
        bytes: vec![n; 300],
        device: None,
        last_resort: false,
        not_before: UnixMillis(0),
        not_after: NOW.plus(600 * MINUTE),
    }
}

pub async fn a_deleted_account_is_found_by_no_call(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    assert_eq!(bench.create_session(alice, 9).await, SessionCreation::Created);
    let token = TokenHash::new([9; 32]);
    assert!(bench.stores.sessions.find(&token).await.expect("find").is_some(), "into the cache");
    bench.deliver_all(bob, alice, &["one", "two"]).await;
    let owner = PackageOwner::account(alice.account);
    let keys = &bench.stores.key_packages;
    keys.upload(owner, vec![package(1)], UploadMode::Add, NOW).await.expect("upload");
    let key = HybridKey { key: vec![1; 1216], signature: None };
    bench.stores.hybrid_keys.put(alice.account, key).await.expect("put");
    bench.delete(alice).await;
    for is_after_a_crash in [false, true] {
        let Stores { accounts, sessions, key_packages, hybrid_keys, .. } = &bench.stores;
        let name = new_account("account1", 1, 1).username;
        assert!(accounts.credentials(&name).await.expect("read").is_none());
        assert_eq!(accounts.by_username(&name).await.expect("read"), None);
        assert_eq!(accounts.by_identity(&alice.identity).await.expect("read"), None);
        assert_eq!(sessions.find(&token).await.expect("find"), None, "{is_after_a_crash}");
        assert_eq!(sessions.confirm(&token).await.expect("confirm"), None);
        assert_eq!(bench.send(message(bob, alice, "three")).await, Enqueued::NoSuchRecipient);
        assert_eq!(bench.peek(all(alice)).await.envelopes, []);
        assert_eq!(key_packages.take(&alice.identity, NOW).await.expect("take"), None);
        assert_eq!(hybrid_keys.get(&[alice.identity]).await.expect("get"), [None]);
        assert_eq!(bench.create_session(alice, 8).await, SessionCreation::NoAccount);
        let again = accounts.delete(alice.account, NOW).await.expect("delete");
        assert_eq!(again, Deletion::NotFound);
        bench.crash().await;
    }
}

pub async fn the_deletion_stores_the_job_that_erases(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let erasure = bench.delete(alice).await;
    let request =
        ClaimRequest { kind: ERASE, limit: 10, lease: MINUTE, horizon: Duration::from_secs(3_600) };
    let jobs = bench.stores.jobs.claim(request, NOW).await.expect("claim");
    let erasures: Vec<_> = jobs.iter().map(|job| ErasureId::of_job(&job.payload)).collect();
    assert_eq!(erasures, [Some(erasure)]);
}

pub async fn the_key_of_a_deleted_account_stays_taken(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.device(alice, 1).await;
    bench.device(alice, 2).await;
    bench.revoke(alice, 2).await;
    let erasure = bench.delete(alice).await;
    for now in [NOW, LATER, LATER] {
        let by_name = new_account("another", 1, 1);
        let registered = bench.stores.accounts.register(by_name).await.expect("register");
        assert_eq!(registered, Registration::IdentityTaken);
        for key in [*alice.identity.as_bytes(), device_key(alice, 1), device_key(alice, 2)] {
            let key = CertifiedKey { key: DeviceKey::new(key), proof: [1; 64] };
            let by_bob = NewDevice { key: Some(key), ..device(bob, 9) };
            let registered = bench.stores.devices.register(by_bob).await.expect("register");
            assert_eq!(registered, DeviceRegistration::KeyTaken);
        }
        bench.erase(erasure, now).await;
        bench.crash().await;
    }
}

/// Returns the key of the device with this number.
fn device_key(owner: RegisteredAccount, n: u8) -> [u8; 32] {
    *device(owner, n).key.expect("its own key").key.as_bytes()
}

pub async fn the_name_of_a_deleted_account_is_reserved_for_a_while(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let erasure = bench.delete(alice).await;
    let accounts = &bench.stores.accounts;
    for name in ["account1", "accountl"] {
        let registered = accounts.register(new_account(name, 7, 7)).await.expect("register");
        assert_eq!(registered, Registration::UsernameTaken, "{name}");
    }
    bench.erase(erasure, NOW).await;
    assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done);
    let until = NOW.plus(NAME_RESERVED);
    bench.backend.set_clock(until.plus(MINUTE)).await;
    for (now, expected) in [(until.minus(MINUTE), false), (until.plus(MINUTE), true)] {
        let new = NewAccount { now, ..new_account("account1", 7, 7) };
        let registered = accounts.register(new).await.expect("register");
        assert_eq!(matches!(registered, Registration::Registered(_)), expected, "{registered:?}");
    }
    sweep_all(&bench, until.plus(MINUTE)).await;
    let key = accounts.register(new_account("other", 1, 1)).await.expect("register");
    assert_eq!(key, Registration::IdentityTaken, "a sweep forgets names, never keys");
}

pub async fn messages_of_a_deleted_account_stay_in_other_inboxes(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    let mut erasures = Vec::new();
    // Both senders use the same message id.
    for (sender, text) in [(alice, "of alice"), (carol, "of carol")] {
        bench.deliver(message(sender, bob, text).with_id(5)).await;
        bench.deliver(message(sender, bob, text)).await;
    }
    for sender in [alice, carol] {
        erasures.push(bench.delete(sender).await);
    }
    for erasure in erasures {
        assert!(matches!(bench.erase(erasure, NOW).await, Erasing::WaitFor(_)));
        assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done);
    }
    assert_eq!(bench.drain(all(bob)).await, ["of alice", "of alice", "of carol", "of carol"]);
    bench.deliver_all(bob, bob, &["next"]).await;
    assert_eq!(bench.peek(all(bob)).await.envelopes[0].seq.0, 5);
}

pub async fn groups_go_on_without_a_deleted_member(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    bench.create_group(1, alice, &[bob, carol]).await;
    bench.create_group(2, alice, &[]).await;
    let pair = Pair::new(alice.identity, bob.identity).expect("two");
    let direct = NewGroup {
        id: group(3),
        creator: alice.account,
        members: NewMembers::Direct(pair),
        name: String::new(),
        description: String::new(),
        now: NOW,
    };
    bench.stores.groups.create(direct).await.expect("create").expect("a new group");
    let info = Some(Commit { expected_epoch: 0, group_info: Some("the members' keys".into()) });
    let commit = GroupMessage { commit: info, ..to_group(1, bob, "commit") };
    bench.stores.groups.send(commit).await.expect("send").expect("accepted");

    let erasure = bench.delete(alice).await;
    // Alice is a member until the erasure, and no call shows that.
    let listed: Vec<_> = bench.members(1, bob).await.into_iter().map(|(key, _)| key).collect();
    assert_eq!(listed, [bob.identity, carol.identity]);
    let sent = bench.stores.groups.send(to_group(1, bob, "hi")).await.expect("send");
    assert_eq!(sent.expect("accepted").recipients, 1, "carol");

    assert!(matches!(bench.erase(erasure, NOW).await, Erasing::WaitFor(_)));
    let members = bench.members(1, carol).await;
    assert_eq!(members, [(bob.identity, Role::Admin), (carol.identity, Role::Member)]);
    let info = bench.stores.groups.info(group(1), bob.account).await.expect("read");
    let info = info.expect("a member");
    assert_eq!((info.group_info, info.epoch), (None, 1));
    let empty = bench.stores.groups.info(group(2), bob.account).await.expect("read");
    assert_eq!(empty, Err(GroupRefusal::NotFound));
    assert_eq!(bench.members(3, bob).await, [(bob.identity, Role::Admin)]);
    assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done);
}

pub async fn an_erasure_continues_after_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    populate(&bench.stores, alice, bob).await;
    let erasure = bench.delete(alice).await;
    for now in [NOW, LATER] {
        loop {
            bench.crash().await;
            match bench.stores.accounts.erase(erasure, now).await.expect("erase") {
                Erasing::More => {}
                Erasing::WaitFor(wait) => {
                    assert!(now == NOW && wait <= CALLS_ENDED, "{wait:?}");
                    break;
                }
                Erasing::Done => break,
            }
        }
    }
    assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done, "a repeat finds nothing");
    let known = bench.stores.key_packages.known(alice.account).await.expect("known");
    assert!(known.is_empty());
    assert_eq!(bench.stores.devices.list(alice.account).await.expect("list"), []);
}

pub async fn writes_of_calls_in_progress_are_erased_too(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let erasure = bench.delete(alice).await;
    let Erasing::WaitFor(wait) = bench.erase(erasure, NOW).await else { panic!("one pass") };
    assert_eq!(wait, CALLS_ENDED);
    // These calls were authenticated before the deletion.
    let owner = PackageOwner::account(alice.account);
    let keys = &bench.stores.key_packages;
    // A store may refuse such a write. If it accepts the write, the erasure must find it.
    let _ = keys.upload(owner, vec![package(1)], UploadMode::Add, NOW).await;
    bench.deliver(message(alice, bob, "late").with_id(1)).await;
    // The pass that begins too early is not the last one.
    let early = NOW.plus(CALLS_ENDED).minus(Duration::from_secs(1));
    assert!(matches!(bench.erase(erasure, early).await, Erasing::WaitFor(_)));
    assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done);
    assert!(keys.known(alice.account).await.expect("known").is_empty());
    assert_eq!(bench.waiting(all(bob)).await, ["late"]);
}

pub async fn a_deletion_during_sends_leaves_no_message_and_no_gap(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    for round in 0..8_u8 {
        let (alice, bob) = (bench.account(10 + round).await, bench.account(110 + round).await);
        let mut sends = JoinSet::new();
        for n in 0..8 {
            let inboxes = Arc::clone(&bench.stores.inboxes);
            let messages: Vec<NewMessage> =
                vec![message(bob, alice, "to alice").with_id(n), message(alice, bob, "to bob")];
            sends.spawn(async move { inboxes.enqueue(Batch::new(messages)).await });
        }
        let (token, sessions) = (TokenHash::new([round; 32]), Arc::clone(&bench.stores.sessions));
        let login = NewSession { token, session: session(alice) };
        let logging_in = tokio::spawn(async move { sessions.create(login).await.expect("create") });
        let erasure = bench.delete(alice).await;
        for outcomes in sends.join_all().await {
            let [to_alice, to_bob] = outcomes.expect("enqueue")[..] else { panic!("two") };
            assert!(matches!(to_alice, Enqueued::Accepted(_) | Enqueued::NoSuchRecipient));
            assert!(matches!(to_bob, Enqueued::Accepted(_)), "{to_bob:?}");
        }
        logging_in.await.expect("no panic");
        assert_eq!(bench.stores.sessions.confirm(&token).await.expect("confirm"), None);
        assert_eq!(bench.send(message(bob, alice, "late")).await, Enqueued::NoSuchRecipient);
        bench.erase(erasure, NOW).await;
        assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done);
        let page = bench.lease(all(bob), EVERYTHING).await;
        let seqs: Vec<_> = page.page().envelopes.iter().map(|envelope| envelope.seq.0).collect();
        assert_eq!(seqs, (1..=8).collect::<Vec<_>>());
        page.complete(NOW).await.expect("complete");
    }
}

pub async fn a_registration_during_a_deletion_never_takes_its_key(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    for round in 0..8_u8 {
        let alice = bench.account(10 + round).await;
        let mut registrations = JoinSet::new();
        for n in 0..8_u8 {
            let accounts = Arc::clone(&bench.stores.accounts);
            let name = if n % 2 == 0 { format!("account{}", 10 + round) } else { format!("n{n}") };
            let new = new_account(&name, 10 + round, 99);
            registrations.spawn(async move { accounts.register(new).await });
        }
        let erasure = bench.delete(alice).await;
        let outcomes = registrations.join_all().await;
        for outcome in outcomes.into_iter().map(|outcome| outcome.expect("register")) {
            let is_refused =
                matches!(outcome, Registration::UsernameTaken | Registration::IdentityTaken);
            assert!(is_refused, "{outcome:?}");
        }
        bench.erase(erasure, NOW).await;
    }
}

pub async fn a_message_to_a_group_during_a_deletion_reaches_the_others(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    for round in 0..8_u8 {
        let (alice, bob, carol) = (
            bench.account(10 + round).await,
            bench.account(110 + round).await,
            bench.account(210 + round).await,
        );
        bench.create_group(10 + round, alice, &[bob, carol]).await;
        let mut sends = JoinSet::new();
        for sender in [bob, alice] {
            let groups = Arc::clone(&bench.stores.groups);
            let commit = Some(Commit { expected_epoch: 0, group_info: Some("info".into()) });
            let sent = GroupMessage { commit, ..to_group(10 + round, sender, "commit") };
            sends.spawn(async move { groups.send(sent).await.expect("send") });
        }
        let erasure = bench.delete(alice).await;
        let outcomes = sends.join_all().await;
        let accepted = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(accepted, 1, "one commit for the epoch: {outcomes:?}");
        assert_eq!(bench.waiting(all(carol)).await, ["commit"]);
        bench.erase(erasure, NOW).await;
        assert_eq!(bench.erase(erasure, LATER).await, Erasing::Done);
        let members: BTreeSet<_> =
            bench.members(10 + round, bob).await.into_iter().map(|(key, _)| key).collect();
        assert_eq!(members, BTreeSet::from([bob.identity, carol.identity]));
    }
}

/// An account that has data of every kind, for a search in everything that a store has written. Its
/// keys and its username occur nowhere else.
#[derive(Clone, Debug)]
pub struct Populated {
    /// The number of the account.
    pub account: AccountId,
    /// The identity key.
    pub identity: IdentityKey,
    /// The username.
    pub username: String,
    /// The keys of the account's devices, one of which is revoked.
    pub device_keys: Vec<[u8; 32]>,
}

impl Populated {
    /// Returns the account that [`Populated::register`] registers.
    pub fn with_number(account: AccountId) -> Self {
        let username = "wilhelmina.quartz".to_owned();
        let identity = IdentityKey::new(unique_key(username.as_bytes()));
        let device_keys = DEVICES.iter().map(|n| unique_key(&[*n])).collect();
        Self { account, identity, username, device_keys }
    }

    /// Registers the account and another one, and creates data of every kind for both.
    pub async fn register(stores: &Stores) -> Self {
        let expected = Self::with_number(AccountId(0));
        let new = NewAccount {
            username: Username::parse(&expected.username).expect("a username"),
            identity: expected.identity,
            ..new_account("unused", 1, 77)
        };
        let Ok(Registration::Registered(account)) = stores.accounts.register(new).await else {
            panic!("the first account of the name")
        };
        let Ok(Registration::Registered(bob)) =
            stores.accounts.register(new_account("bob", 2, 2)).await
        else {
            panic!("the first account of the name")
        };
        let bob = RegisteredAccount { account: bob, identity: IdentityKey::new([2; 32]) };
        populate(stores, RegisteredAccount { account, identity: expected.identity }, bob).await;
        Self { account, ..expected }
    }

    /// Deletes the account at [`NOW`].
    pub async fn delete(&self, stores: &Stores) {
        delete(stores, self.account, NOW).await;
    }

    /// Runs the stored erasures to their end, as the worker of the jobs does.
    pub async fn erase(stores: &Stores) {
        for now in [NOW, LATER] {
            while run_job(stores, now, |_| {}).await {}
        }
    }
}

/// The instant after which all calls that began before a deletion at [`NOW`] have ended.
pub const fn after_all_calls() -> UnixMillis {
    LATER
}

/// The numbers of the account's devices. The last one is revoked.
const DEVICES: [u8; 3] = [1, 2, 3];

fn unique_key(seed: &[u8]) -> [u8; 32] {
    crate::transfer::sha256(seed).try_into().expect("32 bytes")
}

/// Creates data of every kind for `alice`, who is in contact with `bob`.
async fn populate(stores: &Stores, alice: RegisteredAccount, bob: RegisteredAccount) {
    let Stores { sessions, devices, groups, inboxes, key_packages, hybrid_keys, .. } = stores;
    for n in [1, 2] {
        let new = NewSession { token: TokenHash::new([100 + n; 32]), session: session(alice) };
        sessions.create(new).await.expect("create");
        sessions.find(&TokenHash::new([100 + n; 32])).await.expect("find");
    }
    let unregistered = inboxes
        .enqueue(Batch::new(vec![message(bob, alice, "early").with_id(1)]))
        .await
        .expect("enqueue");
    assert!(matches!(unregistered[..], [Enqueued::Accepted(_)]));
    let lease = inboxes.lease(all(alice), EVERYTHING, NOW).await.expect("lease");
    lease.complete(NOW).await.expect("complete");
    for n in DEVICES {
        let key = CertifiedKey { key: DeviceKey::new(unique_key(&[n])), proof: [n; 64] };
        let new = NewDevice { key: Some(key), ..device(alice, n) };
        let registered = devices.register(new).await.expect("register");
        assert_eq!(registered, DeviceRegistration::Registered);
    }
    devices.revoke(alice.account, device_id(3), NOW).await.expect("revoke");
    let owner = PackageOwner::account(alice.account);
    let mut packages: Vec<_> = (1..=5).map(package).collect();
    for package in &mut packages {
        package.bytes.extend(alice.identity.as_bytes());
    }
    key_packages.upload(owner, packages, UploadMode::Add, NOW).await.expect("upload");
    key_packages.take(&alice.identity, NOW).await.expect("take");
    let hybrid =
        HybridKey { key: [&[7; 1184][..], alice.identity.as_bytes()].concat(), signature: None };
    hybrid_keys.put(alice.account, hybrid).await.expect("put");
    for n in 0..40 {
        let text = "x".repeat(usize::from(n) * 100);
        let messages = vec![
            message(bob, alice, &text).with_id(n),
            message(alice, bob, &text).with_id(n),
            message(alice, bob, &text),
            message(alice, alice, &text),
        ];
        inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    }
    let ack = Ack { up_to: None, seqs: vec![Seq(4)], store_id: None };
    let phone = of_device(alice, 1);
    inboxes.ack(phone, ack, NOW).await.expect("ack");
    inboxes.peek(phone, Seq::ZERO, EVERYTHING, NOW).await.expect("peek");
    let lease = inboxes.lease(all(bob), first(10), NOW).await.expect("lease");
    lease.complete(NOW).await.expect("complete");
    create_group(stores, 201, alice, &[bob]).await;
    create_group(stores, 202, bob, &[alice]).await;
    create_group(stores, 203, alice, &[]).await;
    for (n, creator, other) in [(204, alice, bob), (205, bob, alice)] {
        let pair = Pair::new(creator.identity, other.identity).expect("two");
        let direct = NewGroup {
            id: group(n),
            creator: creator.account,
            members: NewMembers::Direct(pair),
            name: String::new(),
            description: String::new(),
            now: NOW,
        };
        groups.create(direct).await.expect("create").expect("a direct group");
    }
    for (n, sender) in [(201, alice), (202, bob), (203, alice)] {
        let group_info = Some(alice.identity.as_bytes().to_vec().into());
        let commit = GroupMessage {
            commit: Some(Commit { expected_epoch: 0, group_info }),
            message_id: Some(MessageId::new([n; 16])),
            recipients: GroupRecipients::All,
            ..to_group(n, sender, &"y".repeat(2_000))
        };
        groups.send(commit).await.expect("send").expect("accepted");
    }
    populate_moderation(stores, alice, bob).await;
}

/// Creates a recovery bundle, blobs, an endpoint and an invite of `alice`, and reports, blocks and
/// bans.
async fn populate_moderation(stores: &Stores, alice: RegisteredAccount, bob: RegisteredAccount) {
    let Stores { recovery_bundles, blobs, endpoints, invites, reports, blocks, bans, .. } = stores;
    let bundle = NewBundle {
        account: alice.account,
        replaces: 0,
        sealed: alice.identity.as_bytes().to_vec(),
        key: AtRestKeyId([1; 8]),
        now: NOW,
    };
    assert_eq!(recovery_bundles.put(bundle).await.expect("put"), BundlePut::Stored);
    for (content, end) in [(&b"a whole blob"[..], 12), (b"an open upload", 7)] {
        let hash: [u8; 32] = crate::transfer::sha256(content).try_into().expect("32 bytes");
        let owner = BlobOwner { account: alice.account, blob: BlobId::new(hash) };
        let chunk = NewChunk {
            owner,
            size: content.len() as u64,
            mime: "image/jpeg".into(),
            offset: 0,
            bytes: content[..end].to_vec().into(),
            now: NOW,
        };
        blobs.upload(chunk).await.expect("upload");
        if end == content.len() {
            assert_eq!(blobs.finish(owner, NOW).await.expect("finish"), BlobFinish::Whole);
        }
    }
    let endpoint = Endpoint {
        node_addr: alice.identity.as_bytes().to_vec().into(),
        expires_at: NOW.plus(600 * MINUTE),
    };
    endpoints.publish(&alice.identity, endpoint, NOW).await.expect("publish");
    let invite = NewInvite {
        code: InviteHash::new([1; 32]),
        uses: 2,
        lifetime: 600 * MINUTE,
        username: Some(
            Username::parse(&Populated::with_number(alice.account).username).expect("a name"),
        ),
        note: String::new(),
        now: NOW,
    };
    invites.create(invite).await.expect("create");
    let report = NewReport {
        reporter: alice.account,
        conversation: "conversation".into(),
        encrypted_report: alice.identity.as_bytes().to_vec().into(),
        now: NOW,
    };
    reports.report(report).await.expect("report");
    create_group(stores, 206, bob, &[alice]).await;
    for (moderator, right, scope, subject) in [
        (bob, ModerationRight::Group, BanScope::Group(group(206)), alice),
        (alice, ModerationRight::Group, BanScope::Group(group(203)), bob),
        (bob, ModerationRight::Server, BanScope::Server, alice),
    ] {
        let RegisteredAccount { account, identity } = moderator;
        let ban = NewBan {
            scope,
            subject: subject.identity,
            moderator: Moderator { account, identity, right },
            reason: "spam".into(),
            duration: None,
            now: NOW,
        };
        bans.ban(ban).await.expect("ban").expect("allowed");
    }
    for (account, blocked) in [(alice, bob), (bob, alice)] {
        let blocking = blocks.block(account.account, blocked.identity, NOW).await.expect("block");
        assert_eq!(blocking, Blocking::Blocked);
    }
}
