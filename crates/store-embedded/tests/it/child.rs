//! A store in a process of its own, which can be killed and limited. The child is this test binary,
//! running the one ignored test below. It reads commands from its standard input, a line of JSON
//! each, and writes the answers to its output.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Lines, Write as _},
    path::{Path, PathBuf},
    process::{self, ChildStdin, ChildStdout, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use qpq_domain::{
    ChannelId, DeliveryLimits, IdentityKey, KeyPackageLimits, MessageId, Seq, StoreLimits,
    UnixMillis,
};
use qpq_ports::{
    Batch, Enqueued, Erasing, NewMessage, PageLimit, ReadQuery, Reader, StoreError, View,
    conformance::deletion::{Populated, run_job},
};
use qpq_store_embedded::EmbeddedStore;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::{
    blobs,
    ops::{Machine, Op, START, key},
};

/// The character before an answer. Distinguishes answers from the output of the test harness.
const MARK: char = '\u{2}';

#[derive(Debug, Serialize, Deserialize)]
enum Command {
    /// Opens the store.
    Open {
        directory: PathBuf,
        max_messages: u64,
        max_bytes: u64,
        sender_share: u64,
        recent_secs: u64,
        absence_secs: u64,
        max_packages: u32,
    },
    Apply {
        op: Op,
        now: u64,
    },
    /// Enqueues messages to account 1 from several concurrent tasks. Answers each outcome.
    Burst {
        from: u64,
        count: u64,
        size: usize,
        tasks: u64,
    },
    /// Creates an account with data of every kind, and deletes it. Answers its number.
    Populate,
    /// Runs the erasure of a deleted account. Answers each batch.
    Erase {
        now: u64,
    },
    /// Uploads blobs from several concurrent tasks, and removes each second one. Answers each
    /// change.
    Blobs {
        from: u64,
        count: u64,
        tasks: u64,
    },
    /// Returns all messages of account 1.
    Inbox,
    Check,
    /// Sets the maximum size of files.
    FileLimit {
        bytes: Option<u64>,
    },
    /// Fills the rest of the file system with a file.
    Fill {
        path: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
}

/// The result of a burst: the acknowledged messages as (number, seq), and the errors of the rest.
#[derive(Debug, Default)]
pub(crate) struct Burst {
    pub(crate) accepted: Vec<(u64, u64)>,
    pub(crate) errors: Vec<String>,
}

/// The child process, for the use of its parent.
pub(crate) struct Child {
    process: process::Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Child {
    pub(crate) fn spawn() -> Self {
        let mut command = process::Command::new(std::env::current_exe().expect("this binary"));
        command.args(ARGUMENTS);
        Self::start(command)
    }

    /// Spawns a child from a shell that first runs `script` with a directory as `$1`.
    pub(crate) fn spawn_after(wrapper: &[&str], script: &str, directory: &Path) -> Self {
        let words = wrapper.iter().chain(&["sh", "-c"]);
        let mut words = words.copied();
        let mut command = process::Command::new(words.next().expect("at least the shell"));
        command
            .args(words)
            .arg(format!("set -e; {script}; shift; exec \"$@\""))
            .arg("sh")
            .arg(directory);
        command.arg(std::env::current_exe().expect("this binary")).args(ARGUMENTS);
        Self::start(command)
    }

    /// Spawns a child as a user without permissions. `binary` is a copy of this test binary that
    /// the user can read.
    pub(crate) fn spawn_as_nobody(binary: &Path) -> Self {
        use std::os::unix::process::CommandExt as _;
        let mut command = process::Command::new(binary);
        command.args(ARGUMENTS).uid(65_534).gid(65_534);
        Self::start(command)
    }

    fn start(mut command: process::Command) -> Self {
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the child starts");
        let commands = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped")).lines();
        Self { process, commands, answers }
    }

    fn send(&mut self, command: &Command) {
        let line = serde_json::to_string(command).expect("plain data");
        writeln!(self.commands, "{line}").expect("the child reads");
    }

    fn answer(&mut self) -> String {
        loop {
            let line = self.answers.next().expect("the child is alive").expect("text");
            if let Some((_, answer)) = line.split_once(MARK) {
                return serde_json::from_str(answer).expect("what the child wrote");
            }
        }
    }

    fn ask(&mut self, command: &Command) -> String {
        self.send(command);
        self.answer()
    }

    fn ask_result(&mut self, command: &Command) -> Result<(), String> {
        let answer = self.ask(command);
        if answer == "ok" { Ok(()) } else { Err(answer) }
    }

    /// Opens the store. The error is the text of the `OpenError`.
    pub(crate) fn open(&mut self, directory: &Path, limits: StoreLimits) -> Result<(), String> {
        self.ask_result(&Command::Open {
            directory: directory.to_owned(),
            max_messages: limits.delivery.max_messages,
            max_bytes: limits.delivery.max_bytes,
            sender_share: limits.delivery.sender_share,
            recent_secs: limits.delivery.recent_ids.as_secs(),
            absence_secs: limits.delivery.device_absence.as_secs(),
            max_packages: limits.key_packages.max_count,
        })
    }

    pub(crate) fn apply(&mut self, op: &Op, now: UnixMillis) -> String {
        self.ask(&Command::Apply { op: op.clone(), now: now.0 })
    }

    /// Enqueues messages to account 1, with numbers from `from` on and `size` bytes each. Returns
    /// after all are answered, or `most` are acknowledged.
    pub(crate) fn burst(&mut self, from: u64, count: u64, size: usize, most: usize) -> Burst {
        self.send(&Command::Burst { from, count, size, tasks: 16 });
        let mut burst = Burst::default();
        while burst.accepted.len() < most {
            let answer = self.answer();
            match answer.split(' ').collect::<Vec<_>>()[..] {
                ["done"] => break,
                ["accepted", n, seq] => {
                    burst
                        .accepted
                        .push((n.parse().expect("a number"), seq.parse().expect("a number")));
                }
                _ => burst.errors.push(answer),
            }
        }
        burst
    }

    /// Creates an account with data of every kind, and deletes it. Returns its number.
    pub(crate) fn populate(&mut self) -> i64 {
        self.ask(&Command::Populate).parse().expect("a number")
    }

    /// Runs the erasure of the deleted account. Returns the progress after the last batch, or after
    /// `most` batches.
    pub(crate) fn erase(&mut self, now: UnixMillis, most: usize) -> String {
        self.send(&Command::Erase { now: now.0 });
        let mut answer = self.answer();
        for _ in 1..most {
            if answer != "more" {
                break;
            }
            answer = self.answer();
        }
        answer
    }

    /// Uploads blobs with numbers from `from` on, and removes those with odd numbers again. Returns
    /// the last acknowledged change of each number, `whole` or `removed`, after `most` changes.
    pub(crate) fn blobs(&mut self, from: u64, count: u64, most: usize) -> HashMap<u64, String> {
        self.send(&Command::Blobs { from, count, tasks: 4 });
        let mut changes = HashMap::new();
        for _ in 0..most {
            let answer = self.answer();
            let (change, number) = answer.split_once(' ').expect("a change and a number");
            changes.insert(number.parse().expect("a number"), change.to_owned());
        }
        changes
    }

    /// Returns (number, seq) of each message in the inbox of account 1.
    pub(crate) fn inbox(&mut self) -> Vec<(u64, u64)> {
        serde_json::from_str(&self.ask(&Command::Inbox)).expect("what the child wrote")
    }

    pub(crate) fn check(&mut self) -> Result<(), String> {
        self.ask_result(&Command::Check)
    }

    pub(crate) fn file_limit(&mut self, bytes: Option<u64>) {
        self.ask_result(&Command::FileLimit { bytes }).expect("a limit");
    }

    pub(crate) fn fill(&mut self, path: &Path) {
        self.ask_result(&Command::Fill { path: path.to_owned() }).expect("a file");
    }

    pub(crate) fn remove(&mut self, path: &Path) {
        self.ask_result(&Command::Remove { path: path.to_owned() }).expect("a file");
    }

    /// Kills the process and waits for its end.
    pub(crate) fn kill(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it ends");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The process may have been killed already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const ARGUMENTS: [&str; 6] = [
    "--exact",
    "child::the_child_process_executes_commands_from_standard_input",
    "--ignored",
    "--nocapture",
    "--test-threads",
    "1",
];

#[test]
#[ignore = "the entry point of the child process that the tests kill; it waits for commands"]
fn the_child_process_executes_commands_from_standard_input() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut opened: Option<(EmbeddedStore, Machine)> = None;
        for line in std::io::stdin().lines() {
            let command: Command =
                serde_json::from_str(&line.expect("text")).expect("what the parent wrote");
            match command {
                Command::Open {
                    directory,
                    max_messages,
                    max_bytes,
                    sender_share,
                    recent_secs,
                    absence_secs,
                    max_packages,
                } => {
                    let delivery = DeliveryLimits {
                        max_messages,
                        max_bytes,
                        sender_share,
                        recent_ids: Duration::from_secs(recent_secs),
                        device_absence: Duration::from_secs(absence_secs),
                        ..DeliveryLimits::default()
                    };
                    let key_packages =
                        KeyPackageLimits { max_count: max_packages, ..KeyPackageLimits::default() };
                    answer(&match EmbeddedStore::open(
                        &directory,
                        StoreLimits { delivery, key_packages, ..StoreLimits::default() },
                    )
                    .await
                    {
                        Err(error) => error.to_string(),
                        Ok(store) => {
                            let machine = Machine::new(store.stores());
                            opened = Some((store, machine));
                            "ok".to_owned()
                        }
                    });
                }
                Command::FileLimit { bytes } => {
                    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).expect("a limit");
                    setrlimit(Resource::RLIMIT_FSIZE, bytes.unwrap_or(hard), hard)
                        .expect("a lower limit");
                    answer("ok");
                }
                Command::Fill { path } => answer(&fill(&path)),
                Command::Remove { path } => {
                    std::fs::remove_file(path).expect("there");
                    answer("ok");
                }
                other => {
                    let (store, machine) = opened.as_mut().expect("opened first");
                    serve_store(store, machine, other).await;
                }
            }
        }
    });
}

async fn serve_store(store: &EmbeddedStore, machine: &mut Machine, command: Command) {
    match command {
        Command::Apply { op, now } => answer(&machine.apply(op, UnixMillis(now)).await),
        Command::Burst { from, count, size, tasks } => burst(store, from, count, size, tasks).await,
        Command::Populate => {
            let account = Populated::register(&store.stores()).await;
            account.delete(&store.stores()).await;
            answer(&account.account.0.to_string());
        }
        Command::Erase { now } => {
            let batch = |progress| {
                answer(match progress {
                    Erasing::More => "more",
                    Erasing::WaitFor(_) => "waiting",
                    Erasing::Done => "done",
                });
            };
            if !run_job(&store.stores(), UnixMillis(now), batch).await {
                answer("done");
            }
        }
        Command::Blobs { from, count, tasks } => {
            let mut running = JoinSet::new();
            for task in 0..tasks {
                let stores = store.stores();
                running.spawn(async move {
                    for n in (from..from + count).filter(|n| n % tasks == task) {
                        blobs::change(&stores, n, |change| answer(&format!("{change} {n}"))).await;
                    }
                });
            }
            running.join_all().await;
        }
        Command::Inbox => answer(&serde_json::to_string(&inbox(store).await).expect("plain data")),
        Command::Check => {
            answer(
                &store
                    .stores()
                    .maintenance
                    .check()
                    .await
                    .map_or_else(describe, |()| "ok".to_owned()),
            );
        }
        other => unreachable!("{other:?}"),
    }
}

fn answer(text: &str) {
    // Under one lock, because tasks answer concurrently, and on a line of its own, because the
    // harness writes there too.
    let mut output = std::io::stdout().lock();
    writeln!(output, "\n{MARK}{}", serde_json::to_string(text).expect("text"))
        .expect("the parent reads");
}

fn describe(error: StoreError) -> String {
    match error {
        StoreError::Conflict(source) => format!("conflict: {source}"),
        StoreError::Unavailable(source) => format!("unavailable: {source}"),
        StoreError::Corrupt(source) => format!("corrupt: {source}"),
    }
}

/// Writes zeros until there is no room for another byte.
fn fill(path: &Path) -> String {
    let mut file = std::fs::File::create(path).expect("a file");
    for size in [1 << 20, 1 << 12, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
    "ok".to_owned()
}

async fn burst(store: &EmbeddedStore, from: u64, count: u64, size: usize, tasks: u64) {
    let inboxes = store.stores().inboxes;
    let mut running = JoinSet::new();
    for task in 0..tasks {
        let inboxes = Arc::clone(&inboxes);
        running.spawn(async move {
            for n in (from..from + count).filter(|n| n % tasks == task) {
                answer(&match inboxes.enqueue(Batch::new(vec![numbered(n, size)])).await {
                    Err(error) => describe(error),
                    Ok(outcomes) => match outcomes[0] {
                        Enqueued::Accepted(receipt) => format!("accepted {n} {}", receipt.seq.0),
                        other => format!("{other:?}"),
                    },
                });
            }
        });
    }
    running.join_all().await;
    answer("done");
}

/// Returns a message whose payload and id begin with its number.
fn numbered(n: u64, size: usize) -> NewMessage {
    let mut payload = vec![0; size.max(8)];
    payload[..8].copy_from_slice(&n.to_be_bytes());
    let mut id = [0; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    NewMessage {
        sender: key(2),
        recipient: key(1),
        channel: ChannelId::DEFAULT,
        payload: payload.into(),
        payload_sha256: [0; 32],
        message_id: Some(MessageId::new(id)),
        now: START,
        ttl: Duration::from_secs(24 * 60 * 60),
    }
}

async fn inbox(store: &EmbeddedStore) -> Vec<(u64, u64)> {
    let read = ReadQuery { reader: Reader::single(IdentityKey::new([1; 32])), view: View::All };
    let everything = PageLimit { messages: u32::MAX, bytes: usize::MAX };
    let page = store.stores().inboxes.peek(read, Seq::ZERO, everything, START).await.expect("peek");
    let number = |payload: &[u8]| u64::from_be_bytes(payload[..8].try_into().expect("eight bytes"));
    page.envelopes.iter().map(|envelope| (number(&envelope.payload), envelope.seq.0)).collect()
}
