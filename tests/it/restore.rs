//! A single node is restored to an earlier state under load, in each way that an operator has.
//! Messages that are acknowledged after the restore are delivered once and in order. The store has
//! another id, so that clients notice the loss of other messages.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_domain::{MessageId, Seq};
use qpq_proto::{
    methods::{Ack, Enqueue, Health, Peek},
    v1,
};
use qpq_test_services::history::{Edge, History, Inbox, Recorder, Tag};
use qpq_tests::{
    accounts::{self, Account},
    client::{Client, endpoint},
    process::sibling,
};
use tokio::{process::Command, sync::Notify, task::JoinSet};

use crate::server::{self, Running};

const INBOXES: usize = 3;
const WRITERS: usize = 3;

/// The way in which an earlier state is restored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `qpq-admin backup` while the server runs, `qpq-admin restore`.
    Backup,
    /// A copy of the stopped server's directory, `qpq-admin mark-restored`.
    ColdCopy,
}

/// The acknowledged messages, by inbox and seq.
#[derive(Clone, Default)]
struct Acknowledged(Arc<Mutex<BTreeMap<(u32, u64), Tag>>>);

/// The state that the writers of one phase share.
struct Writing {
    stop: AtomicBool,
    answers: AtomicU64,
    progress: Notify,
    tags: AtomicU64,
}

impl Writing {
    fn new(first_tag: u64) -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            progress: Notify::new(),
            tags: AtomicU64::new(first_tag),
        })
    }

    /// Waits for `more` further answers.
    async fn answers(&self, more: u64) {
        let until = self.answers.load(Ordering::SeqCst) + more;
        while self.answers.load(Ordering::SeqCst) < until {
            self.progress.notified().await;
        }
    }
}

async fn admin(arguments: &[&str]) {
    let mut command = Command::new(sibling("qpq-admin").expect("the program"));
    let output = command.args(arguments).env_clear().output().await.expect("it can be started");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test")
}

fn payload(tag: Tag) -> Bytes {
    Bytes::copy_from_slice(&tag.0.to_be_bytes())
}

fn tag(payload: &[u8]) -> Tag {
    Tag(u64::from_be_bytes(payload.try_into().expect("eight bytes")))
}

fn id(tag: Tag) -> MessageId {
    MessageId::new((u128::from(tag.0) << 64).to_be_bytes())
}

/// Sends to the inboxes in turn until `stop` is set.
async fn write(
    client: Client,
    accounts: Arc<Vec<Account>>,
    writing: Arc<Writing>,
    acknowledged: Acknowledged,
    mut recorder: Option<Recorder>,
) {
    while !writing.stop.load(Ordering::SeqCst) {
        let tag = Tag(writing.tags.fetch_add(1, Ordering::SeqCst));
        let inbox = u32::try_from(tag.0 % INBOXES as u64).expect("a small number");
        let sending = recorder.as_mut().map(|r| r.sending(Inbox(inbox), id(tag), tag, Edge(0)));
        let account = &accounts[inbox as usize];
        let request = v1::EnqueueRequest {
            recipient_key: account.identity.clone(),
            payload: payload(tag),
            message_id: Bytes::copy_from_slice(&(u128::from(tag.0) << 64).to_be_bytes()),
            ..Default::default()
        };
        let answer = client.must::<Enqueue>(&request, Some(&account.token)).await.expect("sent");
        if let (Some(recorder), Some(sending)) = (&mut recorder, sending) {
            recorder.acknowledged(sending, Seq(answer.seq));
        }
        acknowledged.0.lock().insert((inbox, answer.seq), tag);
        writing.answers.fetch_add(1, Ordering::SeqCst);
        writing.progress.notify_one();
    }
}

/// Reads an inbox from its start and acks the messages by their seqs, until `stop` is set and the
/// inbox is empty.
async fn read(
    client: Client,
    inbox: u32,
    account: &Account,
    writing: &Writing,
    mut recorder: Recorder,
) {
    loop {
        let is_last = writing.stop.load(Ordering::SeqCst);
        let reading = recorder.reading(Inbox(inbox));
        let request = v1::PeekRequest { all_channels: true, limit: 20, ..Default::default() };
        let page = client.must::<Peek>(&request, Some(&account.token)).await.expect("a page");
        let seen: Vec<_> = page.payloads.iter().map(|e| (Seq(e.seq), tag(&e.data))).collect();
        recorder.delivered(reading, seen.iter().copied());
        if seen.is_empty() {
            if is_last {
                return;
            }
            tokio::task::yield_now().await;
            continue;
        }
        let seqs: Vec<Seq> = seen.iter().map(|(seq, _)| *seq).collect();
        let acking = recorder.acking(Inbox(inbox), seqs.iter().copied());
        let seqs = seqs.iter().map(|seq| seq.0).collect();
        let request = v1::AckRequest { seqs, all_channels: true, ..Default::default() };
        client.must::<Ack>(&request, Some(&account.token)).await.expect("acked");
        recorder.acked(acking);
    }
}

async fn store_id(running: &Running) -> Bytes {
    let client = running.connect().await;
    let health = client.must::<Health>(&v1::HealthRequest {}, None).await.expect("health");
    assert_eq!(health.store_id.len(), 16);
    health.store_id
}

/// Logs in to accounts whose sessions ended with the restore.
async fn log_in_again(running: &Running, accounts: &[Account]) -> Vec<Account> {
    let mut again = Vec::new();
    for account in accounts {
        let client = running.connect().await;
        let request = v1::PeekRequest::default();
        let refused = client.call::<Peek>(&request, Some(&account.token)).await.expect("an answer");
        assert_eq!(refused.expect_err("the session has ended").code, "auth.session_expired");
        let token = accounts::login(&client, &account.username).await.expect("a login");
        again.push(Account { token, ..account.clone() });
    }
    again
}

/// Returns all messages of an inbox.
async fn everything(client: &Client, account: &Account) -> BTreeMap<u64, Tag> {
    let mut all = BTreeMap::new();
    loop {
        let after_seq = all.last_key_value().map_or(0, |(seq, _)| *seq);
        let request = v1::PeekRequest { after_seq, all_channels: true, ..Default::default() };
        let page = client.must::<Peek>(&request, Some(&account.token)).await.expect("a page");
        if page.payloads.is_empty() {
            return all;
        }
        all.extend(page.payloads.iter().map(|e| (e.seq, tag(&e.data))));
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a new directory");
    for entry in std::fs::read_dir(from).expect("readable") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
}

/// Copies the running server, or stops it, copies it and starts it again.
async fn keep(way: Way, data: &Path, kept: &Path, running: Running) -> Running {
    match way {
        Way::Backup => {
            admin(&["backup", text(kept), "--data-dir", text(data)]).await;
            running
        }
        Way::ColdCopy => {
            running.process.stop().await.expect("stopped");
            copy(data, kept);
            server::start(data).await
        }
    }
}

async fn bring_back(way: Way, data: &Path, kept: &Path) {
    match way {
        Way::Backup => {
            admin(&["verify", text(kept)]).await;
            admin(&["restore", text(kept), "--replace", "--data-dir", text(data)]).await;
        }
        Way::ColdCopy => {
            std::fs::remove_dir_all(data).expect("removed");
            copy(kept, data);
            admin(&["mark-restored", "--data-dir", text(data)]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_delivers_all_messages_acknowledged_afterwards() {
    go_back(Way::Backup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_marked_cold_copy_delivers_all_messages_acknowledged_afterwards() {
    go_back(Way::ColdCopy).await;
}

async fn go_back(way: Way) {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (data, kept): (PathBuf, PathBuf) = (place.path().join("data"), place.path().join("kept"));
    let mut running = server::start(&data).await;
    let socket = endpoint(running.pin).expect("a socket");
    let made = accounts::make(&socket, running.addr, INBOXES).await;
    let mut accounts = Arc::new(made.expect("accounts"));

    // Before the restore there are no readers, so each inbox has all seqs from 1.
    let acknowledged = Acknowledged::default();
    let mut first_tag = 0;
    let mut before = BTreeMap::new();
    for part in 0..2 {
        let writing = Writing::new(first_tag);
        let mut writers = JoinSet::new();
        for _ in 0..WRITERS {
            let (accounts, writing) = (Arc::clone(&accounts), Arc::clone(&writing));
            let client = running.connect().await;
            writers.spawn(write(client, accounts, writing, acknowledged.clone(), None));
        }
        writing.answers(60).await;
        if part == 0 && way == Way::Backup {
            // The backup is online: the writers keep running.
            before = acknowledged.0.lock().clone();
            running = keep(way, &data, &kept, running).await;
        }
        writing.stop.store(true, Ordering::SeqCst);
        writers.join_all().await;
        first_tag = writing.tags.load(Ordering::SeqCst);
        if part == 0 && way == Way::ColdCopy {
            before = acknowledged.0.lock().clone();
            running = keep(way, &data, &kept, running).await;
        }
    }
    let id_before = store_id(&running).await;
    running.process.stop().await.expect("kill -9");
    bring_back(way, &data, &kept).await;
    let running = server::start(&data).await;

    // Messages from before the copy are there, and the new store id reveals the loss of later ones.
    assert_ne!(store_id(&running).await, id_before, "clients notice the restore");
    let acknowledged = acknowledged.0.lock().clone();
    let history = History::new();
    let mut recorder = history.recorder();
    let client = running.connect().await;
    accounts = Arc::new(log_in_again(&running, &accounts).await);
    let mut lost = acknowledged.len();
    for (inbox, account) in accounts.iter().enumerate() {
        let inbox = u32::try_from(inbox).expect("a small number");
        let there = everything(&client, account).await;
        assert!(there.keys().copied().eq(1..=there.len() as u64), "a seq is missing: {there:?}");
        for ((_, seq), tag) in before.iter().filter(|((of, _), _)| *of == inbox) {
            assert_eq!(there.get(seq), Some(tag), "acknowledged before the copy was made");
        }
        // The checked history begins with the messages that the store has after the restore.
        for (seq, tag) in there {
            let sending = recorder.sending(Inbox(inbox), id(tag), tag, Edge(0));
            recorder.acknowledged(sending, Seq(seq));
            lost -= usize::from(acknowledged.get(&(inbox, seq)) == Some(&tag));
        }
    }
    assert!(lost > 0, "no message was lost, too few for this test");
    drop(recorder);

    // After the restore, other messages have the seqs of the lost ones.
    let writing = Writing::new(first_tag);
    let (mut writers, mut readers) = (JoinSet::new(), JoinSet::new());
    for _ in 0..WRITERS {
        let (accounts, writing) = (Arc::clone(&accounts), Arc::clone(&writing));
        let client = running.connect().await;
        let recorder = Some(history.recorder());
        writers.spawn(write(client, accounts, writing, Acknowledged::default(), recorder));
    }
    for inbox in 0..INBOXES {
        let (accounts, writing) = (Arc::clone(&accounts), Arc::clone(&writing));
        let (client, recorder) = (running.connect().await, history.recorder());
        let number = u32::try_from(inbox).expect("a small number");
        readers.spawn(async move {
            read(client, number, &accounts[inbox], &writing, recorder).await;
        });
    }
    writing.answers(150).await;
    writing.stop.store(true, Ordering::SeqCst);
    writers.join_all().await;
    readers.join_all().await;
    // Messages may have arrived after the last read of a reader.
    for (inbox, account) in accounts.iter().enumerate() {
        let number = u32::try_from(inbox).expect("a small number");
        read(client.clone(), number, account, &writing, history.recorder()).await;
    }
    let report = history.check();
    report.assert_clean();
    assert!(report.acknowledged >= 150 && report.delivered >= 150, "{report:?}");
}
