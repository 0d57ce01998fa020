//! Random contents of a store, created through its ports, and the comparison of two stores by the
//! results of all queries.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use qpq_domain::{
    AccountId, ChannelId, DeviceId, DeviceKey, GroupId, IdentityKey, InviteHash, MessageId, Seq,
    StoreId, TokenHash, UnixMillis, Username,
};
use qpq_ports::{
    Ack, Admission, AtRestKeyId, AuditEntry, AuditPage, BanScope, Batch, CertifiedKey,
    ClaimRequest, Commit, Deletion, DeviceRegistration, Enqueued, GroupMessage, GroupRecipients,
    HybridKey, JobEnd, JobId, JobKind, MemberPage, ModerationRight, Moderator, NewAccount, NewBan,
    NewBundle, NewDevice, NewGroup, NewInvite, NewJob, NewKeyPackage, NewMembers, NewMessage,
    NewReport, NewSession, PackageOwner, Page, PageLimit, ReadQuery, ReadReports, Reader,
    Registration, Report, Reporting, Session, Stores, UploadMode, View,
};
use rand::{Rng as _, RngCore as _, rngs::StdRng};
use sha2::{Digest as _, Sha256};

const JOB: JobKind = JobKind::new("test");

/// The devices of the first account.
const DEVICES: [DeviceId; 2] = [DeviceId::new([1; 16]), DeviceId::new([2; 16])];
const REVOKED: DeviceId = DeviceId::new([3; 16]);

const GROUP: GroupId = GroupId::new([9; 16]);

const HOUR: Duration = Duration::from_secs(60 * 60);

/// The amount of contents.
#[derive(Clone, Copy)]
pub(crate) struct Amount {
    pub(crate) people: usize,
    /// The number of random operations.
    pub(crate) acts: usize,
    /// The size of the largest payload, in bytes.
    pub(crate) payload: usize,
}

/// The contents of a store, as far as queries can return them.
pub(crate) struct Content {
    people: Vec<(NewAccount, AccountId)>,
    tokens: Vec<TokenHash>,
    messages: Vec<NewMessage>,
    packages: Vec<(usize, NewKeyPackage)>,
    now: UnixMillis,
    random: StdRng,
}

/// Enqueues messages. A cluster dates accepted messages by the clock of Postgres, so the date is
/// removed from each outcome.
async fn accept(stores: &Stores, messages: Vec<NewMessage>) -> Vec<Enqueued> {
    let mut outcomes = stores.inboxes.enqueue(Batch::new(messages)).await.unwrap();
    for outcome in &mut outcomes {
        if let Enqueued::Accepted(receipt) = outcome {
            receipt.enqueued_at = UnixMillis(0);
        }
    }
    outcomes
}

impl Content {
    /// Registers accounts and runs random operations on them.
    pub(crate) async fn fill(stores: &Stores, amount: Amount, random: StdRng) -> Self {
        let now = UnixMillis(1_800_000_000_000);
        let (people, tokens, messages, packages) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut content = Self { people, tokens, messages, packages, now, random };
        for number in 0..amount.people {
            content.register(stores, number).await;
        }
        content.devices(stores).await;
        content.group(stores).await;
        content.moderate(stores).await;
        for _ in 0..amount.acts {
            content.now =
                content.now.plus(Duration::from_millis(content.random.gen_range(0..5_000)));
            match content.random.gen_range(0..10) {
                0..=4 => content.send(stores, amount).await,
                5 | 6 => content.read(stores).await,
                7 => content.log_in(stores).await,
                8 => {
                    content.upload(stores).await;
                    content.work(stores).await;
                }
                _ => content.take(stores).await,
            }
        }
        content.delete(stores).await;
        content.read_out_of_order(stores).await;
        content.invite(stores).await;
        content
    }

    /// Returns the usernames.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.people.iter().map(|(person, _)| person.username.as_str())
    }

    pub(crate) fn identities(&self) -> impl Iterator<Item = IdentityKey> {
        self.people.iter().map(|(person, _)| person.identity)
    }

    pub(crate) fn tokens(&self) -> &[TokenHash] {
        &self.tokens
    }

    pub(crate) fn now(&self) -> UnixMillis {
        self.now
    }

    async fn register(&mut self, stores: &Stores, number: usize) {
        let account = NewAccount {
            username: Username::parse(&format!("person{number}")).unwrap(),
            identity: IdentityKey::new(self.random.r#gen()),
            opaque_record: self.bytes(192),
            admission: Admission::Open,
            now: self.now,
        };
        let registered = stores.accounts.register(account.clone()).await.unwrap();
        let Registration::Registered(id) = registered else { panic!("{registered:?}") };
        self.people.push((account, id));
        // Every other account has a recovery bundle, and one that was removed.
        if number.is_multiple_of(2) {
            let (sealed, key) = (self.bytes(1_000), AtRestKeyId(self.random.r#gen()));
            let bundle = NewBundle { account: id, replaces: 0, sealed, key, now: self.now };
            stores.recovery_bundles.put(bundle).await.unwrap();
            stores.recovery_bundles.fetch(id, self.now, 10).await.unwrap();
        }
        if number.is_multiple_of(4) {
            stores.recovery_bundles.remove(id).await.unwrap();
        }
    }

    /// Returns the readers of an inbox. The first account has two devices.
    fn readers(&self, person: usize) -> Vec<Reader> {
        let inbox = self.people[person].0.identity;
        if person > 0 {
            return vec![Reader::single(inbox)];
        }
        DEVICES.map(|device| Reader { inbox, device: Some(device) }).to_vec()
    }

    /// Registers the devices of the first account, and one that is revoked.
    async fn devices(&mut self, stores: &Stores) {
        for device in DEVICES.into_iter().chain([REVOKED]) {
            let key = DeviceKey::new(self.random.r#gen());
            let new = NewDevice {
                account: self.people[0].1,
                device,
                name: "phone".into(),
                key: Some(CertifiedKey { key, proof: [self.random.r#gen(); 64] }),
                session: TokenHash::new([0; 32]),
                now: self.now,
            };
            let registered = stores.devices.register(new).await.unwrap();
            assert_eq!(registered, DeviceRegistration::Registered);
        }
        stores.devices.revoke(self.people[0].1, REVOKED, self.now).await.unwrap();
    }

    /// Acknowledges messages out of order, so that there are acknowledged messages after the
    /// position of a device. Must be the last operation: a later read would move the position past
    /// them.
    async fn read_out_of_order(&mut self, stores: &Stores) {
        for channel in [1, 2] {
            let message = NewMessage {
                recipient: self.people[0].0.identity,
                channel: ChannelId::new([channel; 16]),
                ttl: 7 * 24 * HOUR,
                ..self.message(100)
            };
            stores.inboxes.enqueue(Batch::new(vec![message])).await.unwrap();
        }
        let reader = self.readers(0)[0];
        let read = ReadQuery { reader, view: View::Channel(ChannelId::new([2; 16])) };
        let ack = Ack { up_to: Some(Seq(u64::MAX >> 1)), ..Ack::default() };
        assert!(stores.inboxes.ack(read, ack, self.now).await.unwrap() > 0);
    }

    /// Creates invites, for any username and for one.
    async fn invite(&mut self, stores: &Stores) {
        for username in [None, Some(Username::parse("root").unwrap())] {
            let invite = NewInvite {
                code: InviteHash::new(self.random.r#gen()),
                uses: self.random.gen_range(1..9),
                lifetime: Duration::from_secs(60),
                username,
                note: "a note".into(),
                now: self.now,
            };
            stores.invites.create(invite).await.unwrap();
        }
    }

    /// Creates a group of all accounts and sends it a commit, whose payload the inboxes share.
    async fn group(&mut self, stores: &Stores) {
        let members = self.identities().skip(1).collect();
        let group = NewGroup {
            id: GROUP,
            creator: self.people[0].1,
            members: NewMembers::Listed(members),
            name: "everyone".into(),
            description: "of the test".into(),
            now: self.now,
        };
        stores.groups.create(group).await.unwrap().unwrap();
        stores.groups.send(self.commit()).await.unwrap().unwrap();
    }

    /// Creates blocks, reports, bans, and with the bans entries of the audit trail.
    async fn moderate(&mut self, stores: &Stores) {
        let [blocking, blocked] = [&self.people[2], &self.people[3]];
        stores.blocks.block(blocking.1, blocked.0.identity, self.now).await.unwrap();
        for text in ["one", "two", "three"] {
            let report = NewReport {
                reporter: self.people[2].1,
                conversation: Bytes::from_static(b"conversation"),
                encrypted_report: text.into(),
                now: self.now,
            };
            assert_eq!(stores.reports.report(report).await.unwrap(), Reporting::Stored);
        }
        for (scope, subject, duration) in [
            (BanScope::Server, 4, None),
            (BanScope::Server, 5, Some(1_000 * HOUR)),
            (BanScope::Group(GROUP), 6, None),
            (BanScope::Group(GROUP), 7, Some(1_000 * HOUR)),
        ] {
            let ban = NewBan {
                scope,
                subject: self.people[subject].0.identity,
                moderator: self.moderator(self.people[0].1),
                reason: format!("reason {subject}"),
                duration,
                now: self.now,
            };
            stores.bans.ban(ban).await.unwrap().unwrap();
        }
    }

    /// Returns the first account as an administrator.
    fn moderator(&self, account: AccountId) -> Moderator {
        let identity = self.people[0].0.identity;
        Moderator { account, identity, right: ModerationRight::Server }
    }

    /// Returns the commit of the group. A repeat has the same result.
    fn commit(&self) -> GroupMessage {
        let payload = Bytes::from_static(&[7; 2_000]);
        GroupMessage {
            group: GROUP,
            sender: self.people[0].1,
            sender_key: self.people[0].0.identity,
            sender_device: None,
            recipients: GroupRecipients::Listed(self.identities().collect()),
            payload_sha256: Sha256::digest(&payload).into(),
            payload,
            message_id: Some(MessageId::new([7; 16])),
            ttl: 7 * 24 * HOUR,
            now: self.now,
            commit: Some(Commit { expected_epoch: 0, group_info: Some("info".into()) }),
        }
    }

    async fn send(&mut self, stores: &Stores, amount: Amount) {
        let count = self.random.gen_range(1..40);
        let messages: Vec<_> = (0..count).map(|_| self.message(amount.payload)).collect();
        for outcome in stores.inboxes.enqueue(Batch::new(messages.clone())).await.unwrap() {
            assert!(
                matches!(
                    outcome,
                    Enqueued::Accepted(_)
                        | Enqueued::Refused
                        | Enqueued::QueueFull
                        | Enqueued::SenderShare
                ),
                "{outcome:?}"
            );
        }
        self.messages.extend(messages);
    }

    fn message(&mut self, largest: usize) -> NewMessage {
        let sender = self.random_person();
        let recipient = self.people[sender].0.identity;
        let sender = self.random_person();
        let size = self.random.gen_range(0..=largest);
        let payload = self.bytes(size);
        NewMessage {
            sender: self.people[sender].0.identity,
            recipient,
            channel: self.channel(),
            payload_sha256: Sha256::digest(&payload).into(),
            payload: Bytes::from(payload),
            message_id: self.random.gen_bool(0.6).then(|| MessageId::new(self.random.r#gen())),
            now: self.now,
            ttl: [Duration::from_secs(10), HOUR, 7 * 24 * HOUR][self.random.gen_range(0..3)],
        }
    }

    async fn read(&mut self, stores: &Stores) {
        let person = self.random.gen_range(0..self.people.len());
        let readers = self.readers(person);
        let reader = readers[self.random.gen_range(0..readers.len())];
        let view = if self.random.r#gen() { View::All } else { View::Channel(self.channel()) };
        let read = ReadQuery { reader, view };
        let limit = PageLimit { messages: self.random.gen_range(1..20), bytes: 1 << 20 };
        let lease = stores.inboxes.lease(read, limit, self.now).await.unwrap();
        let seen: Vec<Seq> = lease.page().envelopes.iter().map(|envelope| envelope.seq).collect();
        if self.random.r#gen() {
            lease.complete(self.now).await.unwrap();
        } else {
            drop(lease);
            let seqs = seen.into_iter().filter(|_| self.random.r#gen()).collect();
            stores.inboxes.ack(read, Ack { seqs, ..Ack::default() }, self.now).await.unwrap();
        }
    }

    /// Deletes an account that no other operation uses. Its erasure has not run.
    async fn delete(&mut self, stores: &Stores) {
        let account = NewAccount {
            username: Username::parse("leaver").unwrap(),
            identity: IdentityKey::new(self.random.r#gen()),
            opaque_record: self.bytes(192),
            admission: Admission::Open,
            now: self.now,
        };
        let registered = stores.accounts.register(account).await.unwrap();
        let Registration::Registered(id) = registered else { panic!("{registered:?}") };
        let deleted = stores.accounts.delete(id, self.now).await.unwrap();
        assert!(matches!(deleted, Deletion::Deleted(_)), "{deleted:?}");
    }

    async fn log_in(&mut self, stores: &Stores) {
        let person = self.random_person();
        let token = TokenHash::new(self.random.r#gen());
        let session = Session {
            account: self.people[person].1,
            identity: self.people[person].0.identity,
            device: self.random.r#gen::<bool>().then(|| DeviceId::new(self.random.r#gen())),
            authenticated_at: self.now,
            last_used_at: self.now,
            expires_at: self.now.plus(HOUR),
        };
        stores.sessions.create(NewSession { token, session }).await.unwrap();
        self.tokens.push(token);
        let other = self.tokens[self.random.gen_range(0..self.tokens.len())];
        match self.random.gen_range(0..3) {
            0 => stores.sessions.touch(&other, self.now, self.now.plus(2 * HOUR)).await.unwrap(),
            1 => drop(stores.sessions.revoke(&other).await.unwrap()),
            _ => {}
        }
        let signature = self.random.r#gen::<bool>().then(|| [self.random.r#gen(); 64]);
        let key = HybridKey { key: self.bytes(1_216), signature };
        stores.hybrid_keys.put(self.people[person].1, key).await.unwrap();
    }

    async fn upload(&mut self, stores: &Stores) {
        let person = self.random_person();
        let packages: Vec<_> = (0..self.random.gen_range(1..6))
            .map(|_| NewKeyPackage {
                fingerprint: self.random.r#gen(),
                bytes: self.bytes(300),
                device: None,
                last_resort: self.random.gen_bool(0.2),
                not_before: self.now,
                not_after: self.now.plus(self.random.gen_range(1..200) * HOUR / 10),
            })
            .collect();
        let owner = PackageOwner::account(self.people[person].1);
        let keys = &stores.key_packages;
        keys.upload(owner, packages.clone(), UploadMode::Add, self.now).await.unwrap();
        self.packages.extend(packages.into_iter().map(|package| (person, package)));
    }

    /// Stores jobs and claims one. Its run ends with a random outcome or does not end.
    async fn work(&mut self, stores: &Stores) {
        let jobs = (0..3)
            .map(|_| NewJob {
                kind: JOB,
                key: self.random.r#gen::<bool>().then(|| self.bytes(1)),
                payload: self.bytes(100),
                delay: self.random.gen_range(0..20) * HOUR / 10,
            })
            .collect();
        stores.jobs.put(jobs, self.now).await.unwrap();
        let one = ClaimRequest { kind: JOB, limit: 1, lease: HOUR, horizon: 9 * HOUR };
        let Some(job) = stores.jobs.claim(one, self.now).await.unwrap().pop() else {
            return;
        };
        let end = match self.random.gen_range(0..4) {
            0 => JobEnd::Done,
            1 => JobEnd::RetryAfter { wait: HOUR, error: "later".into() },
            2 => JobEnd::Dead { error: "never".into() },
            _ => return,
        };
        stores.jobs.finish(job.claim, end, self.now).await.unwrap();
    }

    async fn take(&mut self, stores: &Stores) {
        let person = self.random_person();
        stores.key_packages.take(&self.people[person].0.identity, self.now).await.unwrap();
    }

    fn random_person(&mut self) -> usize {
        // Some accounts are chosen more often than others.
        let most = self.random.gen_range(0..self.people.len());
        self.random.gen_range(0..=most)
    }

    fn channel(&mut self) -> ChannelId {
        match self.random.gen_range(0..3_u8) {
            0 => ChannelId::DEFAULT,
            n => ChannelId::new([n; 16]),
        }
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    /// Compares the results of both stores: first of reads, then of operations that change them.
    pub(crate) async fn compare(&self, one: &Stores, two: &Stores) {
        self.compare_accounts(one, two).await;
        self.compare_devices(one, two).await;
        self.compare_groups(one, two).await;
        self.compare_moderation(one, two).await;
        for at in [self.now, self.now.plus(2 * HOUR)] {
            self.compare_inboxes(one, two, at).await;
        }
        self.compare_keys(one, two).await;
        self.compare_invites(one, two).await;
        self.compare_jobs(one, two).await;
        self.compare_reading(one, two).await;
        self.compare_repeats(one, two).await;
        self.compare_sessions(one, two).await;
    }

    pub(crate) async fn compare_accounts(&self, one: &Stores, two: &Stores) {
        for (person, _) in &self.people {
            let known = async |stores: &Stores| {
                let (name, identity) = (&person.username, &person.identity);
                let credentials = stores.accounts.credentials(name).await.unwrap().unwrap();
                let by_name = stores.accounts.by_username(name).await.unwrap().unwrap();
                let by_identity = stores.accounts.by_identity(identity).await.unwrap().unwrap();
                assert_eq!(by_name, by_identity);
                assert_eq!(by_name.id, credentials.account);
                (
                    credentials.identity,
                    credentials.opaque_record,
                    by_name.username,
                    by_name.created_at,
                    stores.recovery_bundles.find(by_name.id).await.unwrap(),
                )
            };
            assert_eq!(known(one).await, known(two).await);
        }
    }

    async fn compare_devices(&self, one: &Stores, two: &Stores) {
        let (first, second) = (self.accounts(one).await, self.accounts(two).await);
        let list = async |stores: &Stores, id| stores.devices.list(id).await.unwrap();
        let devices = list(one, first[0]).await;
        assert_eq!(devices.iter().map(|device| device.id).collect::<Vec<_>>(), DEVICES);
        assert_eq!(devices, list(two, second[0]).await);
    }

    async fn compare_groups(&self, one: &Stores, two: &Stores) {
        let (first, second) = (self.accounts(one).await, self.accounts(two).await);
        let page = MemberPage { after: 0, limit: 1_000 };
        let view = async |stores: &Stores, id| {
            let view = stores.groups.members(GROUP, id, page).await.unwrap().unwrap();
            let info = stores.groups.info(GROUP, id).await.unwrap().unwrap();
            let commit = GroupMessage { sender: id, ..self.commit() };
            let repeat = stores.groups.send(commit).await.unwrap().unwrap();
            assert!(repeat.is_repeat);
            (view, info, repeat)
        };
        assert_eq!(view(one, first[0]).await, view(two, second[0]).await);
    }

    async fn compare_moderation(&self, one: &Stores, two: &Stores) {
        let (first, second) = (self.accounts(one).await, self.accounts(two).await);
        let known = async |stores: &Stores, accounts: &[AccountId]| {
            let mut bans = Vec::new();
            for scope in [BanScope::Server, BanScope::Group(GROUP)] {
                let moderator = self.moderator(accounts[0]);
                let listed = stores.bans.list(scope, moderator, 100, self.now).await.unwrap();
                let listed: Vec<_> = listed.unwrap();
                assert_eq!(listed.len(), 2);
                bans.push(listed);
            }
            let blocked = stores.blocks.list(accounts[2]).await.unwrap();
            assert_eq!(blocked.len(), 1);
            let page = AuditPage { before: None, limit: 100 };
            let audit = stores.audit.list(page).await.unwrap();
            let audit: Vec<_> =
                audit.into_iter().map(|entry| AuditEntry { id: 0, ..entry }).collect();
            assert!(audit.len() >= 4);
            let read = ReadReports {
                reader: self.people[0].0.identity,
                offset: 0,
                limit: 100,
                bytes: u32::MAX,
                now: self.now,
            };
            let reports = stores.reports.read(read).await.unwrap();
            let reports: Vec<_> =
                reports.into_iter().map(|report| Report { id: 0, ..report }).collect();
            assert_eq!(reports.len(), 3);
            // A ban that ends at the same instant may be listed before or after another one.
            bans.iter_mut().for_each(|bans| bans.sort_by_key(|ban| ban.identity));
            (bans, blocked, audit, reports)
        };
        assert_eq!(known(one, &first).await, known(two, &second).await);
    }

    pub(crate) async fn compare_inboxes(&self, one: &Stores, two: &Stores, at: UnixMillis) {
        let channels = [ChannelId::DEFAULT, ChannelId::new([1; 16]), ChannelId::new([2; 16])];
        let views: Vec<View> = channels.map(View::Channel).into_iter().chain([View::All]).collect();
        for reader in (0..self.people.len()).flat_map(|person| self.readers(person)) {
            for view in &views {
                let read = ReadQuery { reader, view: *view };
                let (mut pages, mut after) = (0, Seq::ZERO);
                loop {
                    let limit = PageLimit { messages: 50, bytes: 100_000 };
                    let peek = async |stores: &Stores| {
                        let page = stores.inboxes.peek(read, after, limit, at).await.unwrap();
                        // The store ids differ.
                        Page { store_id: StoreId::new([0; 16]), ..page }
                    };
                    let page: Page = peek(one).await;
                    assert_eq!(page, peek(two).await, "{view:?} after {after:?}, page {pages}");
                    pages += 1;
                    match page.envelopes.last() {
                        Some(last) if page.more => after = last.seq,
                        _ => break,
                    }
                }
            }
        }
    }

    async fn compare_keys(&self, one: &Stores, two: &Stores) {
        let identities: Vec<_> = self.identities().collect();
        let hybrid = async |stores: &Stores| stores.hybrid_keys.get(&identities).await.unwrap();
        assert_eq!(hybrid(one).await, hybrid(two).await);
        let (first, second) = (self.accounts(one).await, self.accounts(two).await);
        for (n, (person, _)) in self.people.iter().enumerate() {
            let now = self.now;
            let stock =
                async |stores: &Stores, id| stores.key_packages.stock(id, now).await.unwrap();
            let owners = [first[n], second[n]].map(PackageOwner::account);
            assert_eq!(stock(one, owners[0]).await, stock(two, owners[1]).await);
            // An issued package is refused, a stored one is ignored, and an expired one is accepted
            // again.
            for (_, package) in self.packages.iter().filter(|(owner, _)| *owner == n) {
                let upload = async |stores: &Stores, id| {
                    let packages = vec![package.clone()];
                    stores.key_packages.upload(id, packages, UploadMode::Add, now).await.unwrap()
                };
                assert_eq!(upload(one, owners[0]).await, upload(two, owners[1]).await);
            }
            loop {
                let take = async |stores: &Stores| {
                    stores.key_packages.take(&person.identity, now).await.unwrap()
                };
                let taken = take(one).await;
                assert_eq!(taken, take(two).await);
                if taken.is_none_or(|taken| taken.last_resort) {
                    break;
                }
            }
        }
    }

    async fn compare_invites(&self, one: &Stores, two: &Stores) {
        let [one, two] = [one, two].map(|stores| stores.invites.list(u32::MAX));
        let (one, two) = (one.await.unwrap(), two.await.unwrap());
        assert_eq!((one.len(), &one), (2, &two));
    }

    async fn compare_jobs(&self, one: &Stores, two: &Stores) {
        // With a horizon of zero, jobs that are due later are claimed too.
        let all = ClaimRequest {
            kind: JOB,
            limit: u32::MAX,
            lease: HOUR,
            horizon: std::time::Duration::ZERO,
        };
        let jobs = async |stores: &Stores| {
            let mut dead = stores.jobs.dead(u32::MAX).await.unwrap();
            // Each store numbers its jobs itself.
            dead.iter_mut().for_each(|job| job.id = JobId(0));
            dead.sort_by_key(|job| (job.died_at, job.attempts));
            let due = stores.jobs.claim(all, self.now).await.unwrap();
            let mut due: Vec<_> = due.into_iter().map(|job| (job.payload, job.attempt)).collect();
            due.sort();
            (dead, due)
        };
        let (first, second) = (jobs(one).await, jobs(two).await);
        assert_eq!(first, second);
        assert!(!first.1.is_empty());
    }

    async fn compare_reading(&self, one: &Stores, two: &Stores) {
        for reader in (0..self.people.len()).flat_map(|person| self.readers(person)) {
            let read = ReadQuery { reader, view: View::All };
            let fetch = async |stores: &Stores| {
                let limit = PageLimit { messages: 5, bytes: 1 << 20 };
                let lease = stores.inboxes.lease(read, limit, self.now).await.unwrap();
                // The store ids differ.
                let page = Page { store_id: StoreId::new([0; 16]), ..lease.page().clone() };
                lease.complete(self.now).await.unwrap();
                let up_to = page.envelopes.last().map(|last| Seq(last.seq.0 + 3));
                (
                    page,
                    stores
                        .inboxes
                        .ack(read, Ack { up_to, ..Ack::default() }, self.now)
                        .await
                        .unwrap(),
                )
            };
            assert_eq!(fetch(one).await, fetch(two).await);
        }
        self.compare_inboxes(one, two, self.now).await;
    }

    /// Compares repeats of every message, including removed ones, and the next seq of each inbox.
    async fn compare_repeats(&self, one: &Stores, two: &Stores) {
        let mut duplicates = 0;
        for messages in self.messages.chunks(100) {
            let again: Vec<_> = messages
                .iter()
                .cloned()
                .map(|message| NewMessage { now: self.now, ttl: HOUR, ..message })
                .collect();
            let outcomes = accept(one, again.clone()).await;
            assert_eq!(outcomes, accept(two, again).await);
            duplicates +=
                outcomes.iter().filter(|outcome| matches!(outcome, Enqueued::Duplicate(_))).count();
        }
        assert!(duplicates > 0, "no repeat was recognised");
        for (person, _) in &self.people {
            let again = async |stores: &Stores| match stores
                .accounts
                .register(person.clone())
                .await
                .unwrap()
            {
                Registration::Repeated(_) => true,
                other => panic!("{other:?}"),
            };
            assert!(again(one).await && again(two).await);
        }
    }

    async fn compare_sessions(&self, one: &Stores, two: &Stores) {
        let mut there = 0;
        for token in &self.tokens {
            let look = async |stores: &Stores| {
                let found = stores.sessions.find(token).await.unwrap();
                assert_eq!(found, stores.sessions.confirm(token).await.unwrap());
                if let Some(session) = &found {
                    let account = stores.accounts.by_identity(&session.identity).await.unwrap();
                    assert_eq!(account.map(|account| account.id), Some(session.account));
                }
                // The account was compared above. Each store has its own account numbers.
                found.map(|session| Session { account: AccountId(0), ..session })
            };
            let session = look(one).await;
            assert_eq!(session, look(two).await);
            there += usize::from(session.is_some());
        }
        assert!(there > 0, "no session was found");
        let mut ended: HashMap<&str, [u32; 2]> = HashMap::new();
        for (index, stores) in [one, two].into_iter().enumerate() {
            for (name, id) in self.names().zip(self.accounts(stores).await) {
                ended.entry(name).or_default()[index] =
                    stores.sessions.revoke_all(id).await.unwrap();
            }
        }
        assert!(ended.values().all(|[first, second]| first == second), "{ended:?}");
    }

    /// Returns the account numbers of a store.
    async fn accounts(&self, stores: &Stores) -> Vec<AccountId> {
        let mut accounts = Vec::new();
        for identity in self.identities() {
            accounts.push(stores.accounts.by_identity(&identity).await.unwrap().unwrap().id);
        }
        accounts
    }
}
