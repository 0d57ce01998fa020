//! *Conversations of several devices*: three accounts on five devices change two groups, write,
//! lose their state, crash and join again, through three edges. In the end all agree on the groups,
//! and every message is shown once on every device that may see it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and its journal is shown then"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeBounds,
    path::{Path, PathBuf},
    time::Duration,
};

use qpq_client::{
    ConversationId, ConversationKind, EntryId, Error, Event, Membership, Messenger, MlsError,
    Options, Password, Role, SendOutcome, Trust, Username, VaultKey,
};
use qpq_tests::cluster::{Cluster, EntryPoints, Plan};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::time::timeout;

const EDGES: usize = 3;
const STEPS: usize = 60;
/// Longer than anything here takes.
const STUCK: Duration = Duration::from_secs(120);
const PASSWORD: &str = "correct horse battery staple";

/// One device of an account.
struct Device {
    account: &'static str,
    name: &'static str,
    dir: PathBuf,
    key: VaultKey,
    /// `None` only while the client is restarted.
    messenger: Option<Messenger>,
    /// An older copy of the device's directory.
    copy: Option<PathBuf>,
    /// The step in which the device went back to an older copy of itself. Messages sent before
    /// may be lost or shown again.
    lost_at: Option<usize>,
    /// The step in which the device joined its groups by itself. Messages from devices that have
    /// not read since then are only requested again.
    rejoined_at: Option<usize>,
    /// The step in which the device read its inbox.
    read_at: usize,
    /// How many times each text was shown.
    shown: BTreeMap<String, usize>,
    /// How many messages of each account were shown as unreadable.
    unreadable: BTreeMap<String, usize>,
    seen: BTreeSet<EntryId>,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.account, self.name)
    }
}

impl Device {
    fn messenger(&self) -> &Messenger {
        self.messenger.as_ref().expect("it is running")
    }

    /// Takes in what came, and notes the texts.
    async fn read(&mut self, step: usize) {
        self.read_at = step;
        let messenger = self.messenger().clone();
        let entries = messenger.receive().await.unwrap();
        for request in messenger.requests().await.unwrap().waiting {
            messenger.accept(request.id).await.unwrap();
        }
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        for entry in entries {
            // Shown if the test fails.
            println!("{step}: {self}: {:?}", entry.event);
            assert!(self.seen.insert(entry.id) || self.lost_at.is_some(), "shown twice");
            match entry.event {
                Event::Received { text, .. } | Event::Sent { text, .. } => {
                    *self.shown.entry(text).or_default() += 1;
                }
                Event::Unreadable { from: Some(person), .. } => {
                    *self.unreadable.entry(person.username.to_string()).or_default() += 1;
                }
                _ => {}
            }
        }
        messenger.mark_seen(&ids).await.unwrap();
    }

    async fn groups(&self) -> Vec<ConversationId> {
        let conversations = self.messenger().conversations().await.unwrap();
        let is_member = |kind: &ConversationKind| {
            matches!(kind, ConversationKind::Group { membership: Membership::Member, .. })
        };
        conversations.into_iter().filter(|one| is_member(&one.kind)).map(|one| one.id).collect()
    }

    /// The accounts in a group with the names of their devices, as this device sees them.
    async fn members(
        &self,
        group: ConversationId,
    ) -> Option<BTreeMap<String, (Role, BTreeSet<String>)>> {
        let members = match self.messenger().group_members(group).await {
            Err(Error::NoSuchConversation) => return None,
            members => members.unwrap(),
        };
        let members = members
            .into_iter()
            .map(|one| {
                let devices = one.devices.into_iter().collect();
                (one.person.username.to_string(), (one.role, devices))
            })
            .collect();
        Some(members)
    }

    async fn restart(&mut self) {
        drop(self.messenger.take());
        let lock = std::fs::File::open(self.dir.join("lock")).unwrap();
        tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
        let messenger = Messenger::unlock_with_key(&self.dir, self.key.clone()).await.unwrap();
        self.messenger = Some(messenger);
    }
}

/// A text that was sent, and who was to read it.
struct Sent {
    step: usize,
    text: String,
    by: usize,
    /// The step in which the sender had read its inbox.
    read_at: usize,
    /// Accounts with their devices, by the sender's view of the group.
    to: BTreeMap<String, BTreeSet<String>>,
}

struct World {
    random: StdRng,
    entry_points: EntryPoints,
    dir: PathBuf,
    devices: Vec<Device>,
    sent: Vec<Sent>,
    /// The steps in which an account has left a group or was removed from one. Unread messages of
    /// the account are lost, and so are messages from devices that have not processed the change
    /// yet.
    left: BTreeMap<&'static str, Vec<usize>>,
    copies: usize,
}

fn username(name: &str) -> Username {
    Username::parse(name).unwrap()
}

fn password() -> Password {
    Password::from(PASSWORD)
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

impl World {
    fn options(&self, edge: usize) -> Options {
        let trust = Trust::Pinned(hex::encode(self.entry_points.pin.0).parse().unwrap());
        Options {
            // Each message is preceded by a look for new devices.
            devices_every: Duration::ZERO,
            ..Options::new(self.entry_points.addrs[edge % EDGES].to_string(), trust)
        }
    }

    async fn adopt(
        &mut self,
        account: &'static str,
        name: &'static str,
        dir: PathBuf,
        messenger: Messenger,
    ) {
        let key = messenger.vault_key().await;
        self.devices.push(Device {
            account,
            name,
            dir,
            key,
            messenger: Some(messenger),
            copy: None,
            lost_at: None,
            rejoined_at: None,
            read_at: 0,
            shown: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            seen: BTreeSet::new(),
        });
    }

    async fn register(&mut self, account: &'static str) {
        let dir = self.dir.join(account);
        let options = self.options(self.devices.len());
        let (username, password) = (username(account), password());
        let registering = Messenger::register(&dir, options, &username, &password, None);
        let messenger = Box::pin(registering).await.unwrap();
        self.adopt(account, "first device", dir, messenger).await;
    }

    async fn link(&mut self, account: &'static str, name: &'static str) {
        let dir = self.dir.join(format!("{account}-{name}"));
        let options = self.options(self.devices.len());
        let linking =
            Messenger::link(&dir, options, &username(account), &password(), name).await.unwrap();
        let old = self.devices.iter().find(|device| device.account == account).unwrap();
        old.messenger().receive().await.unwrap();
        let requests = old.messenger().link_requests().await.unwrap();
        let request = requests.iter().find(|request| request.code == linking.code()).unwrap();
        old.messenger().approve_link(request, &password()).await.unwrap();
        let messenger = linking.finish(STUCK).await.unwrap();
        self.adopt(account, name, dir, messenger).await;
    }

    async fn step(&mut self, number: usize) {
        let who = self.random.gen_range(0..self.devices.len());
        let groups = self.devices[who].groups().await;
        let group = groups.choose(&mut self.random).copied();
        let choice = self.random.gen_range(0..100);
        println!("{number}: {}: {choice}", self.devices[who]);
        match (choice, group) {
            (0..=39, Some(group)) => self.send(who, group, number).await,
            (40..=69, _) | (_, None) => self.devices[who].read(number).await,
            (70..=73, Some(group)) => {
                let name = format!("name {number}");
                let renamed = self.devices[who].messenger().rename(group, &name);
                allow(renamed.await);
            }
            (74..=80, Some(group)) => self.invite_or_remove(who, group, number).await,
            (81..=85, Some(group)) => self.change_role(who, group).await,
            (86, Some(group)) => {
                self.devices[who].read(number).await;
                allow(self.devices[who].messenger().leave(group).await);
                self.left.entry(self.devices[who].account).or_default().push(number);
            }
            (87..=88, Some(group)) => {
                self.devices[who].read(number).await;
                allow(self.devices[who].messenger().rejoin(group).await);
                self.devices[who].rejoined_at = Some(number);
            }
            (89..=92, Some(_)) => self.devices[who].restart().await,
            (93..=94, Some(_)) => self.keep_a_copy(who).await,
            (95, Some(_)) => self.lose_state(who, number).await,
            (_, Some(group)) => {
                // The device crashes during the change.
                let name = format!("half {number}");
                let polls = Duration::from_millis(self.random.gen_range(1..60));
                let renamed = self.devices[who].messenger().rename(group, &name);
                if let Ok(renamed) = timeout(polls, renamed).await {
                    allow(renamed);
                }
                self.devices[who].restart().await;
            }
        }
    }

    async fn send(&mut self, who: usize, group: ConversationId, number: usize) {
        let sender = &self.devices[who];
        let text = format!("{number} by {} on {}", sender.account, sender.name);
        let sent = sender.messenger().send(group, &text).await;
        match sent {
            Ok(sent) => assert!(!matches!(sent.outcome, SendOutcome::Refused), "{sent:?}"),
            // The account was removed, or left on another device.
            Err(
                Error::Mls(MlsError::NoLongerMember | MlsError::Alone) | Error::NoSuchConversation,
            ) => return,
            Err(error) => panic!("{error:?}"),
        }
        // Another device of the account may have left the group, which came meanwhile.
        let members = sender.members(group).await.unwrap_or_default();
        let to = members.into_iter().map(|(account, (_, devices))| (account, devices)).collect();
        let read_at = sender.read_at;
        self.sent.push(Sent { step: number, text, by: who, read_at, to });
    }

    async fn invite_or_remove(&mut self, who: usize, group: ConversationId, number: usize) {
        let account = *["alice", "bob", "carol"].choose(&mut self.random).unwrap();
        let device = &self.devices[who];
        if device.account == account {
            return;
        }
        let members = device.messenger().members(group).await.unwrap();
        let member = members.iter().find(|person| person.username == username(account));
        let changed = match member {
            Some(person) => {
                self.left.entry(account).or_default().push(number);
                device.messenger().remove(group, person.identity).await
            }
            None => device.messenger().add(group, &username(account)).await,
        };
        allow(changed);
    }

    async fn change_role(&mut self, who: usize, group: ConversationId) {
        let device = &self.devices[who];
        let members = device.messenger().group_members(group).await.unwrap();
        let one = members.choose(&mut self.random).unwrap();
        let role = if one.role == Role::Admin { Role::Member } else { Role::Admin };
        allow(device.messenger().set_role(group, one.person.identity, role).await);
    }

    async fn keep_a_copy(&mut self, who: usize) {
        self.copies += 1;
        let copy = self.dir.join(format!("copy-{}", self.copies));
        let device = &mut self.devices[who];
        drop(device.messenger.take());
        let lock = std::fs::File::open(device.dir.join("lock")).unwrap();
        tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
        copy_dir(&device.dir, &copy);
        device.copy = Some(copy);
        device.restart().await;
    }

    async fn lose_state(&mut self, who: usize, number: usize) {
        let device = &mut self.devices[who];
        let Some(copy) = device.copy.take() else { return };
        drop(device.messenger.take());
        let lock = std::fs::File::open(device.dir.join("lock")).unwrap();
        tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
        std::fs::remove_dir_all(&device.dir).unwrap();
        copy_dir(&copy, &device.dir);
        (device.lost_at, device.rejoined_at) = (Some(number), Some(number));
        device.restart().await;
        device.read(number).await;
        for group in device.groups().await {
            allow(device.messenger().rejoin(group).await);
        }
        device.read(number).await;
    }

    /// Lets everyone read until nothing more arrives.
    async fn settle(&mut self) {
        for _ in 0..6 {
            for who in 0..self.devices.len() {
                self.devices[who].read(STEPS).await;
            }
        }
    }

    /// Checks that the devices agree about every group.
    async fn check_groups(&self, seed: u64) {
        let mut states = BTreeMap::new();
        for device in &self.devices {
            for group in device.groups().await {
                let ConversationId::Group(id) = group else { continue };
                let (_, epoch) = device.messenger().group_state(id).await.unwrap();
                let conversations = device.messenger().conversations().await.unwrap();
                let kind = conversations.into_iter().find(|one| one.id == group).unwrap().kind;
                let ConversationKind::Group { name, .. } = kind else { panic!("{kind:?}") };
                let members = device.members(group).await.expect("it is a member");
                let of = device.to_string();
                states.entry(id).or_insert_with(Vec::new).push((of, epoch, name, members));
            }
        }
        for (id, mut states) in states {
            // A device that went back to before its account was removed cannot know of that.
            let latest = states.iter().map(|state| state.1).max();
            let newest = states.iter().find(|state| Some(state.1) == latest).cloned();
            let (_, _, _, members) = newest.expect("there is one");
            states.retain(|(of, ..)| {
                let device = self.devices.iter().find(|device| device.to_string() == *of).unwrap();
                device.lost_at.is_none() || members.contains_key(device.account)
            });
            for state in &states {
                let (one, other) = (&states[0], state);
                assert_eq!(
                    (one.1, &one.2, &one.3),
                    (other.1, &other.2, &other.3),
                    "seed {seed}, {id}: {} and {}",
                    one.0,
                    other.0
                );
            }
            for device in &self.devices {
                let of = device.to_string();
                let is_in = states.iter().any(|state| state.0 == of);
                let is_member = members.contains_key(device.account);
                assert!(is_in || !is_member, "seed {seed}, {id}: {of} is a member and not in it");
            }
        }
    }

    /// Returns whether an account has left a group or was removed from one in these steps.
    fn left_in(&self, account: &str, steps: impl RangeBounds<usize>) -> bool {
        self.left.get(account).into_iter().flatten().any(|left| steps.contains(left))
    }

    /// Checks that every message was shown once to those who may see it.
    fn check_messages(&self, seed: u64) {
        let texts: BTreeSet<_> = self.sent.iter().map(|sent| sent.text.as_str()).collect();
        for device in &self.devices {
            for (text, times) in &device.shown {
                let of = format!("seed {seed}, {device}");
                assert!(texts.contains(text.as_str()), "{of}: {text:?} was never sent");
                assert!(
                    *times == 1 || device.lost_at.is_some(),
                    "{of}: {text:?} shown {times} times"
                );
            }
        }
        let mut expected = 0;
        // The numbers of refused messages, by reader and sender.
        let mut refused = BTreeMap::<_, usize>::new();
        for (place, sent) in self.sent.iter().enumerate() {
            let by = self.devices[sent.by].account;
            for (who, device) in self.devices.iter().enumerate() {
                let is_reader = who != sent.by
                    && sent.to.get(device.account).is_some_and(|all| all.contains(device.name));
                let is_exempt = device.lost_at.is_some_and(|lost| sent.step <= lost)
                    || device.rejoined_at.is_some_and(|at| sent.step >= at && sent.read_at <= at)
                    || self.left_in(device.account, sent.read_at..);
                if !is_reader || is_exempt {
                    continue;
                }
                let times = device.shown.get(&sent.text).copied().unwrap_or(0);
                // The sender did not know yet that it was removed.
                if times == 0 && self.left_in(by, sent.read_at..sent.step) {
                    *refused.entry((who, by)).or_default() += 1;
                    continue;
                }
                expected += 1;
                assert_eq!(times, 1, "seed {seed}, {device}: {:?} (message {place})", sent.text);
            }
        }
        for ((who, by), count) in refused {
            let device = &self.devices[who];
            let named = device.unreadable.get(by).copied().unwrap_or(0);
            assert!(
                count <= named,
                "seed {seed}, {device}: {count} of {by} missing, {named} named"
            );
        }
        println!("seed {seed}: {} messages, {expected} readings checked", self.sent.len());
    }
}

/// Passes over refusals that a random change deserves.
fn allow(done: Result<SendOutcome, Error>) {
    match done {
        Ok(_)
        | Err(
            Error::Mls(
                MlsError::NotAdmin
                | MlsError::LastAdmin
                | MlsError::NoLongerMember
                | MlsError::NotAMember(_)
                | MlsError::UnknownGroup
                | MlsError::Alone,
            )
            | Error::AlreadyMember(_)
            | Error::NoSuchConversation
            | Error::NoGroupInfo
            | Error::GroupBusy,
        ) => {}
        Err(error)
            if error
                .call()
                .and_then(|call| call.server())
                .is_some_and(|refused| refused.code.starts_with("group.")) => {}
        Err(error) => panic!("{error:?}"),
    }
}

async fn run(seed: u64, entry_points: &EntryPoints, dir: PathBuf) {
    let mut world = World {
        random: StdRng::seed_from_u64(seed),
        entry_points: entry_points.clone(),
        dir,
        devices: Vec::new(),
        sent: Vec::new(),
        left: BTreeMap::new(),
        copies: 0,
    };
    for account in ["alice", "bob", "carol"] {
        world.register(account).await;
    }
    world.link("alice", "laptop").await;
    for (creator, name) in [(0, "friends"), (1, "work")] {
        let messenger = world.devices[creator].messenger().clone();
        let group = messenger.create_group(name).await.unwrap();
        for other in ["alice", "bob", "carol"] {
            if world.devices[creator].account != other {
                messenger.add(group, &username(other)).await.unwrap();
            }
        }
    }
    for device in &mut world.devices {
        device.read(0).await;
        device.read(0).await;
    }
    world.link("bob", "tablet").await;
    for number in 0..STEPS {
        timeout(STUCK, world.step(number)).await.expect("a step ends");
    }
    world.settle().await;
    world.check_groups(seed).await;
    world.check_messages(seed);
}

async fn run_all(seeds: impl Iterator<Item = u64>) {
    for seed in seeds {
        let cluster = Cluster::start(Plan { edges: EDGES, ..Plan::default() }).await.unwrap();
        let dir = cluster.dir().join("profiles");
        Box::pin(run(seed, &cluster.entry_points(), dir)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_of_several_devices_end_in_one_state() {
    run_all(1..3).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes ten minutes: make conversations"]
async fn many_conversations_of_several_devices_end_in_one_state() {
    run_all(3..33).await;
}
