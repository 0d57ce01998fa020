//! Measures the bytes written for each received message.
//!
//! `cargo nextest run -p qpq-client --run-ignored only --no-capture -E 'test(bytes_written)'`

use std::path::Path;

use qpq_domain::{UnixMillis, Username};
use qpq_mls::{
    Change, Content, GroupId, Identity, NewMember,
    database::{Database, DatabaseError},
    vault::VaultKey,
};
use qpq_proto::v1;

use super::{
    log::{ConversationId, Event},
    now,
    page::process_page,
    state::State,
};
use crate::error::Error;

const MESSAGES: u64 = 100;

/// A peer with a direct group.
struct Peer {
    state: State,
    group: GroupId,
}

fn username(name: &str) -> Username {
    Username::parse(name).unwrap()
}

fn change<R>(database: &Database, change: impl FnOnce(&mut State) -> Result<R, Error>) -> R {
    database
        .write(|| {
            let mut state = State::open(database)?;
            let result = change(&mut state)?;
            state.save()?;
            Ok::<_, Error>(result)
        })
        .unwrap()
}

fn receive(database: &Database, first: u64, payloads: Vec<Vec<u8>>) {
    let envelope = |(seq, data): (u64, Vec<u8>)| v1::Envelope {
        seq,
        data: data.into(),
        enqueued_at: now().0,
        ..Default::default()
    };
    let payloads = (first..).zip(payloads).map(envelope).collect();
    let page = v1::PeekResponse { payloads, ..Default::default() };
    change(database, |state| process_page(state, page, None, now()));
}

fn peer(number: usize, bob: &Database) -> (Peer, Vec<u8>) {
    let name = username(&format!("peer{number}"));
    let mut state = State::create(&Database::in_memory(), Identity::generate(), name).unwrap();
    let (me, packages) = change(bob, |state| Ok((state.me(), state.mls.key_packages(1, now())?)));
    let group = state.mls.create_direct(me, now()).unwrap();
    let added =
        NewMember { identity: me, username: username("bob"), key_package: packages[0].clone() };
    let change = Change { add: vec![added], ..Change::default() };
    let commit = state.mls.commit(group, &change, now()).unwrap().unwrap();
    state.mls.confirm(group).unwrap();
    let welcome = commit.welcome.unwrap();
    (Peer { state, group }, welcome)
}

impl Peer {
    fn message(&mut self, number: u64) -> Vec<u8> {
        let mut id = [0; 16];
        id[8..].copy_from_slice(&number.to_be_bytes());
        let text = "x".repeat(100);
        let content = Content { id, sent_at: now().0, text, repeats: None, file: None };
        self.state.mls.encrypt(self.group, &content).unwrap().payload
    }
}

/// Returns the number of bytes that this process has passed to `write` and similar calls.
fn written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse().unwrap()
}

/// Returns the bytes written for one message, received alone and in a page of 100.
fn measure(dir: &Path, conversations: usize, entries: usize) -> [u64; 2] {
    let key = VaultKey::from_bytes(&[1; 48]);
    let path = dir.join(format!("{conversations}-{entries}.db"));
    let bob = Database::create(&path, &key, |database| {
        State::create(database, Identity::generate(), username("bob"))?.save()?;
        Ok::<_, DatabaseError>(())
    })
    .unwrap();
    let mut peers = Vec::new();
    let mut seq = 1;
    for number in 0..conversations {
        let (peer, welcome) = peer(number, &bob);
        receive(&bob, seq, vec![welcome]);
        seq += 1;
        peers.push(peer);
    }
    let others: Vec<_> = peers.iter().map(|peer| peer.state.me()).collect();
    change(&bob, |state| {
        for number in 0..entries {
            let from = others[number % others.len()];
            let event =
                Event::Received { from, text: "x".repeat(100), sent_at: UnixMillis(1), file: None };
            let entry = state.log.push(Some(ConversationId::Direct(from)), UnixMillis(1), event)?;
            state.log.mark_seen(&[entry])?;
        }
        Ok(())
    });
    let mut bytes = [0; 2];
    for (place, page) in [(0, 1), (1, MESSAGES)] {
        let messages: Vec<_> = (0..MESSAGES).map(|number| peers[0].message(number)).collect();
        let before = written();
        for page in messages.chunks(usize::try_from(page).unwrap()) {
            receive(&bob, seq, page.to_vec());
            seq += page.len() as u64;
        }
        bytes[place] = (written() - before) / MESSAGES;
    }
    bytes
}

#[test]
#[ignore = "a measurement, for a person to read"]
fn bytes_written_for_a_received_message_are_printed() {
    let dir = tempfile::tempdir().unwrap();
    for (conversations, entries) in [(1, 0), (1, 10_000), (200, 10_000)] {
        let [alone, in_a_page] = measure(dir.path(), conversations, entries);
        println!(
            "{conversations} conversations, {entries} entries: {alone} bytes alone, \
             {in_a_page} in a page of {MESSAGES}"
        );
    }
}
