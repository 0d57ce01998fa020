//! A few clients, and in place of the server a queue for each and a directory of key packages.

use std::collections::{BTreeMap, VecDeque};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis, Username};
use qpq_mls::{
    Added, Arrival, Client, Content, GroupId, Identity, Invitee, Lost, Member, Parcel, Received,
    database::Database,
};

pub(crate) const ANN: usize = 0;
pub(crate) const BOB: usize = 1;
pub(crate) const CAT: usize = 2;
pub(crate) const DAN: usize = 3;

/// openmls compares lifetimes with the system's clock, so that clock it is.
#[expect(clippy::disallowed_methods, reason = "the clock that openmls reads cannot be another")]
pub(crate) fn now() -> UnixMillis {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap())
}

pub(crate) trait Hear {
    /// Receives a message that arrives now.
    fn hear(&mut self, bytes: &[u8]) -> Vec<Received>;
}

impl Hear for Client {
    fn hear(&mut self, bytes: &[u8]) -> Vec<Received> {
        self.receive(bytes, Arrival { at: now(), channel: ChannelId::DEFAULT }).unwrap()
    }
}

pub(crate) fn client(identity: Identity, name: &Username) -> Client {
    Client::create(&Database::in_memory(), identity, name.clone()).unwrap()
}

/// Whether this is one message, lost for this reason.
pub(crate) fn is_lost(received: &[Received], reason: Lost) -> bool {
    matches!(received, [Received::Unreadable(lost)] if lost.reason == reason)
}

pub(crate) struct World {
    pub(crate) clients: Vec<Client>,
    pub(crate) inboxes: Vec<VecDeque<Vec<u8>>>,
    names: Vec<Username>,
    packages: Vec<VecDeque<Vec<u8>>>,
    index: BTreeMap<IdentityKey, usize>,
}

impl World {
    pub(crate) fn new(size: usize) -> Self {
        let names: Vec<Username> = ["ann", "bob", "cat", "dan"][..size]
            .iter()
            .map(|name| Username::parse(name).unwrap())
            .collect();
        let clients: Vec<Client> =
            names.iter().map(|name| client(Identity::generate(), name)).collect();
        let index = clients.iter().enumerate().map(|(at, c)| (c.identity().public(), at)).collect();
        Self {
            clients,
            names,
            index,
            inboxes: vec![VecDeque::new(); size],
            packages: vec![VecDeque::new(); size],
        }
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

    /// A package of `who`, as the server would give it out.
    pub(crate) fn package(&mut self, who: usize) -> Vec<u8> {
        if self.packages[who].is_empty() {
            self.packages[who] = self.clients[who].key_packages(3, now()).unwrap().into();
        }
        self.packages[who].pop_front().unwrap()
    }

    pub(crate) fn try_add(
        &mut self,
        creator: usize,
        group: GroupId,
        who: &[usize],
    ) -> Result<Added, qpq_mls::Error> {
        let packages: Vec<_> = who.iter().map(|&who| self.package(who)).collect();
        let invitees: Vec<Invitee<'_>> = who
            .iter()
            .zip(&packages)
            .map(|(&who, key_package)| Invitee {
                identity: self.clients[who].identity().public(),
                username: &self.names[who],
                key_package,
            })
            .collect();
        self.clients[creator].add(group, &invitees, now())
    }

    /// Adds people and posts what comes of it.
    pub(crate) fn add(&mut self, creator: usize, group: GroupId, who: &[usize]) {
        let added = self.try_add(creator, group, who).unwrap();
        if let Some(commit) = added.commit {
            self.post(&commit);
        }
        self.post(&added.welcome);
    }

    /// A group of `who`, made by the first of them; everyone has joined.
    pub(crate) fn group(&mut self, who: &[usize]) -> GroupId {
        let channel = ChannelId::new([5; 16]);
        let group = self.clients[who[0]].create_group("friends", channel, now()).unwrap();
        self.add(who[0], group, &who[1..]);
        for &member in &who[1..] {
            assert!(matches!(self.deliver(member)[..], [Received::Joined(_)]));
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
        for recipient in &parcel.recipients {
            self.inboxes[self.index[recipient]].push_back(parcel.payload.clone());
        }
    }

    /// Delivers the oldest message in a client's inbox.
    pub(crate) fn deliver(&mut self, who: usize) -> Vec<Received> {
        let message = self.inboxes[who].pop_front().expect("something is in the inbox");
        self.clients[who].hear(&message)
    }

    /// Delivers everything in a client's inbox.
    pub(crate) fn deliver_all(&mut self, who: usize) -> Vec<Received> {
        let mut received = Vec::new();
        while !self.inboxes[who].is_empty() {
            received.extend(self.deliver(who));
        }
        received
    }

    /// Ends the client's process and starts it again from what it would have saved.
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
    Content { id: [3; 16], sent_at: 1_234, text: text.to_owned(), repeats: None }
}

/// The texts among what was received, in order.
pub(crate) fn texts(received: &[Received]) -> Vec<&str> {
    received
        .iter()
        .filter_map(|received| match received {
            Received::Message { content, .. } => Some(content.text.as_str()),
            _ => None,
        })
        .collect()
}
