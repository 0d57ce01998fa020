//! A few clients and, in place of the server, an inbox for each and a directory of KeyPackages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis, Username};
use qpq_mls::{
    Arrival, Change, Client, Commit, Content, Device, Error, GroupId, Identity, Lost, Member,
    NewMember, Parcel, Received, Rules, database::Database,
};

pub(crate) const ANN: usize = 0;
pub(crate) const BOB: usize = 1;
pub(crate) const CAT: usize = 2;
pub(crate) const DAN: usize = 3;

/// Returns the time of the system's clock, with which openmls compares lifetimes.
#[expect(clippy::disallowed_methods, reason = "the clock that openmls reads cannot be another")]
pub(crate) fn now() -> UnixMillis {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap())
}

pub(crate) trait ReceiveNow {
    /// Receives a message that arrives now.
    fn receive_now(&mut self, bytes: &[u8]) -> Vec<Received>;
}

impl ReceiveNow for Client {
    fn receive_now(&mut self, bytes: &[u8]) -> Vec<Received> {
        self.receive(bytes, Arrival { at: now(), channel: ChannelId::DEFAULT }).unwrap()
    }
}

pub(crate) fn client(identity: Identity, name: &Username) -> Client {
    Client::create(&Database::in_memory(), identity, name.clone()).unwrap()
}

/// Returns whether `received` is one message that is lost for `reason`.
pub(crate) fn is_lost(received: &[Received], reason: Lost) -> bool {
    matches!(received, [Received::Unreadable(lost)] if lost.reason == reason)
}

/// Returns whether `received` is one message of a removed member, refused because it arrived after
/// the removal.
pub(crate) fn is_refused_from(received: &[Received], sender: IdentityKey) -> bool {
    is_lost(received, Lost::NotAMember)
        && matches!(received, [Received::Unreadable(lost)] if lost.claimed_sender == Some(sender))
}

/// Clients, each of which is a device. Devices of one account share its identity, and each reads
/// all messages to the account.
pub(crate) struct World {
    pub(crate) clients: Vec<Client>,
    pub(crate) inboxes: Vec<VecDeque<Vec<u8>>>,
    names: Vec<Username>,
    packages: Vec<VecDeque<Vec<u8>>>,
    devices: BTreeMap<IdentityKey, Vec<usize>>,
}

impl World {
    /// Creates accounts without devices.
    pub(crate) fn new(size: usize) -> Self {
        let names: Vec<Username> = ["ann", "bob", "cat", "dan"][..size]
            .iter()
            .map(|name| Username::parse(name).unwrap())
            .collect();
        let clients: Vec<Client> =
            names.iter().map(|name| client(Identity::generate(), name)).collect();
        let key = |client: &Client| client.identity().public();
        let devices = clients.iter().enumerate().map(|(at, one)| (key(one), vec![at])).collect();
        Self {
            clients,
            names,
            devices,
            inboxes: vec![VecDeque::new(); size],
            packages: vec![VecDeque::new(); size],
        }
    }

    /// Creates accounts with one device each, which has the name of the account.
    pub(crate) fn with_devices(size: usize) -> Self {
        let mut world = Self::new(size);
        for client in &mut world.clients {
            let device = Device::generate(client.identity(), client.username().as_str());
            client.set_device(device).unwrap();
        }
        world
    }

    /// Creates a further device of the account that `who` is a device of.
    pub(crate) fn new_device(&mut self, who: usize, name: &str) -> usize {
        let identity = self.clients[who].identity();
        let device = Device::generate(identity, name);
        let identity = Identity::from_seed(self.clients[who].identity().seed());
        let place = self.clients.len();
        self.devices.get_mut(&identity.public()).unwrap().push(place);
        let mut new = client(identity, &self.names[who]);
        new.set_device(device).unwrap();
        self.clients.push(new);
        self.names.push(self.names[who].clone());
        self.inboxes.push(VecDeque::new());
        self.packages.push(VecDeque::new());
        place
    }

    /// Replaces a client by one of the same device that has lost all other state.
    pub(crate) fn lose_state(&mut self, who: usize) {
        let identity = Identity::from_seed(self.clients[who].identity().seed());
        let device = self.clients[who].device().cloned();
        self.clients[who] = client(identity, &self.names[who]);
        if let Some(device) = device {
            self.clients[who].set_device(device).unwrap();
        }
        self.packages[who].clear();
    }

    pub(crate) fn key(&self, who: usize) -> IdentityKey {
        self.clients[who].identity().public()
    }

    pub(crate) fn name(&self, who: usize) -> &Username {
        &self.names[who]
    }

    pub(crate) fn member(&self, who: usize) -> Member {
        Member { identity: self.key(who), username: self.names[who].clone() }
    }

    /// Returns a package of `who`, as the server issues it.
    pub(crate) fn package(&mut self, who: usize) -> Vec<u8> {
        if self.packages[who].is_empty() {
            self.packages[who] = self.clients[who].key_packages(3, now()).unwrap().into();
        }
        self.packages[who].pop_front().unwrap()
    }

    /// Returns the device `who`, with a package that the server issues.
    pub(crate) fn offer(&mut self, who: usize) -> NewMember {
        let key_package = self.package(who);
        NewMember { identity: self.key(who), username: self.names[who].clone(), key_package }
    }

    /// Returns the change that adds devices.
    pub(crate) fn addition(&mut self, who: &[usize]) -> Change {
        let add = who.iter().map(|&who| self.offer(who)).collect();
        Change { add, ..Change::default() }
    }

    /// Returns the change that removes accounts.
    pub(crate) fn removal(&self, who: &[usize]) -> Change {
        Change { remove: who.iter().map(|&who| self.key(who)).collect(), ..Change::default() }
    }

    /// Returns the change that removes a device.
    pub(crate) fn device_removal(&self, who: usize) -> Change {
        let device = self.clients[who].device().map(Device::id);
        Change { remove_devices: vec![(self.key(who), device)], ..Change::default() }
    }

    /// Creates a commit without sending it.
    pub(crate) fn create(
        &mut self,
        author: usize,
        group: GroupId,
        change: &Change,
    ) -> Result<Option<Commit>, Error> {
        self.clients[author].commit(group, change, now())
    }

    pub(crate) fn try_add(
        &mut self,
        author: usize,
        group: GroupId,
        who: &[usize],
    ) -> Result<Option<Commit>, Error> {
        let change = self.addition(who);
        self.create(author, group, &change)
    }

    /// Commits a change that the server accepts, and posts the messages of the commit.
    pub(crate) fn change(&mut self, author: usize, group: GroupId, change: &Change) -> Commit {
        let commit = self.create(author, group, change).unwrap().expect("it changes something");
        self.accept(author, &commit);
        commit
    }

    /// Accepts a commit as the server does, and posts its messages. Returns the results of its
    /// author.
    pub(crate) fn accept(&mut self, author: usize, commit: &Commit) -> Vec<Received> {
        let received = self.clients[author].confirm(commit.group).unwrap();
        self.post_commit(commit);
        received
    }

    pub(crate) fn post_commit(&mut self, commit: &Commit) {
        self.post_to(&commit.recipients, &commit.payload);
        if let Some(welcome) = &commit.welcome {
            self.post_to(&commit.invited, welcome);
        }
    }

    pub(crate) fn add(&mut self, author: usize, group: GroupId, who: &[usize]) -> Commit {
        let change = self.addition(who);
        self.change(author, group, &change)
    }

    pub(crate) fn remove(&mut self, author: usize, group: GroupId, who: &[usize]) -> Commit {
        let change = self.removal(who);
        self.change(author, group, &change)
    }

    /// Creates a group by the first of `who`, which all of them have joined.
    pub(crate) fn group(&mut self, who: &[usize]) -> GroupId {
        let channel = ChannelId::new([5; 16]);
        let group = self.clients[who[0]].create_group("friends", channel, now()).unwrap();
        self.add(who[0], group, &who[1..]);
        for &member in &who[1..] {
            assert!(matches!(self.deliver(member)[..], [Received::Joined { .. }]));
        }
        group
    }

    pub(crate) fn encrypt(&mut self, who: usize, group: GroupId, text: &str) -> Vec<u8> {
        self.clients[who].encrypt(group, &content(text)).unwrap().payload
    }

    pub(crate) fn say(&mut self, who: usize, group: GroupId, text: &str) {
        let parcel = self.clients[who].encrypt(group, &content(text)).unwrap();
        self.post(&parcel);
    }

    pub(crate) fn post(&mut self, parcel: &Parcel) {
        self.post_to(&parcel.recipients, &parcel.payload);
    }

    fn post_to(&mut self, recipients: &[IdentityKey], payload: &[u8]) {
        for device in recipients.iter().flat_map(|recipient| &self.devices[recipient]) {
            self.inboxes[*device].push_back(payload.to_vec());
        }
    }

    /// Receives a message that arrives now.
    pub(crate) fn receive(&mut self, who: usize, bytes: &[u8]) -> Vec<Received> {
        let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
        self.receive_at(who, bytes, arrival)
    }

    pub(crate) fn receive_at(&mut self, who: usize, bytes: &[u8], at: Arrival) -> Vec<Received> {
        let has_other_devices = self.devices[&self.key(who)].len() > 1;
        let rules = Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(true), has_other_devices };
        self.clients[who].receive_by(bytes, at, &rules).unwrap()
    }

    /// Delivers the oldest message in a client's inbox.
    pub(crate) fn deliver(&mut self, who: usize) -> Vec<Received> {
        let message = self.inboxes[who].pop_front().expect("something is in the inbox");
        self.receive(who, &message)
    }

    /// Delivers everything in a client's inbox.
    pub(crate) fn deliver_all(&mut self, who: usize) -> Vec<Received> {
        let mut received = Vec::new();
        while !self.inboxes[who].is_empty() {
            received.extend(self.deliver(who));
        }
        received
    }

    /// Ends the client's process and starts it again from its saved state.
    pub(crate) fn restart(&mut self, who: usize) {
        self.clients[who] = restored(&mut self.clients[who]);
    }
}

/// Returns the state of a new process that opens a copy of the client's files.
pub(crate) fn restored(client: &mut Client) -> Client {
    client.save().unwrap();
    Client::open(&client.database().copy()).unwrap()
}

pub(crate) fn content(text: &str) -> Content {
    Content { id: [3; 16], sent_at: 1_234, text: text.to_owned(), repeats: None, file: None }
}

/// Returns the texts among received messages, in order.
pub(crate) fn texts(received: &[Received]) -> Vec<&str> {
    received
        .iter()
        .filter_map(|received| match received {
            Received::Message { content, .. } => Some(content.text.as_str()),
            _ => None,
        })
        .collect()
}
