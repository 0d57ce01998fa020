//! Random interleavings of restores from older copies and of crashes.
//!
//! Two people write to each other. The server is replaced by an older copy, a profile is replaced
//! by an older copy, and a process ends between any two steps of sending and receiving. Each text
//! acknowledged to its sender after the last replacement is shown exactly once, or an entry names
//! the sender as the author of an unreadable message.
//!
//! `QPQ_SEED` and `QPQ_SEEDS` set the first seed and their number.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use qpq_client::{ConversationId, Event, Messenger, SendOutcome, VaultKey};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::harness::{Server, copy_dir, crash_after, dm, restart, soon};

const SEEDS: u64 = 4;
const STEPS: usize = 14;
/// The upper bound of polls before a crash. Most sending and receiving takes fewer.
const MOST_POLLS: usize = 24;

const NAMES: [&str; 2] = ["alice", "bob"];

/// A person, who writes to the other one.
struct Side {
    messenger: Option<Messenger>,
    key: VaultKey,
    dir: PathBuf,
    other: ConversationId,
    /// The number of unreadable messages of the other person that were shown since the last
    /// replacement.
    unreadable: usize,
}

impl Side {
    async fn new(server: &Server, own: usize, messenger: &Messenger) -> Self {
        Self {
            key: messenger.vault_key().await,
            dir: server.profile(NAMES[own]),
            other: dm(messenger, NAMES[1 - own]).await,
            messenger: Some(messenger.clone()),
            unreadable: 0,
        }
    }

    fn messenger(&self) -> Messenger {
        self.messenger.clone().expect("it runs between two steps")
    }

    /// Ends the process and waits until it has ended.
    async fn end(&mut self) {
        self.messenger = None;
        let lock = fs::File::open(self.dir.join("lock")).unwrap();
        soon(tokio::task::spawn_blocking(move || lock.lock())).await.unwrap().unwrap();
    }

    async fn start(&mut self) {
        self.messenger = Some(restart(&self.dir, &self.key).await);
    }
}

/// The outcome of sending a text, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The sender received the server's acknowledgement.
    Acknowledged,
    /// The sender's process ended, or the server did not accept the text. The text may arrive or
    /// not.
    Unknown,
}

struct World {
    server: Server,
    sides: [Side; 2],
    random: StdRng,
    copies: tempfile::TempDir,
    /// The texts sent since the last replacement, with the side that sent them.
    sent: BTreeMap<String, (usize, Fate)>,
    /// The number of times that each text was shown.
    shown: BTreeMap<String, usize>,
    server_copy: Option<PathBuf>,
    profile_copies: [Option<PathBuf>; 2],
    next: usize,
    acknowledged: usize,
    replaced: usize,
}

impl World {
    async fn new(seed: u64) -> Self {
        let server = Server::start().await;
        let users = server.users(NAMES).await;
        let sides =
            [Side::new(&server, 0, &users[0]).await, Side::new(&server, 1, &users[1]).await];
        // Each side has the only handle to its profile.
        drop(users);
        let mut world = Self {
            server,
            sides,
            random: StdRng::seed_from_u64(seed),
            copies: tempfile::tempdir().unwrap(),
            sent: BTreeMap::new(),
            shown: BTreeMap::new(),
            server_copy: None,
            profile_copies: [None, None],
            next: 0,
            acknowledged: 0,
            replaced: 0,
        };
        // Odd seeds begin with a conversation, even ones without.
        if seed % 2 == 1 {
            world.send(0).await;
            world.read(1).await;
        }
        world.copy_server().await;
        world.copy_profile(0).await;
        world.copy_profile(1).await;
        world
    }

    /// Takes a random step; returns its description.
    async fn step(&mut self) -> String {
        let side = self.random.gen_range(0..2);
        let polls = self.random.gen_range(1..MOST_POLLS);
        let name = NAMES[side];
        match self.random.gen_range(0..16) {
            0..=3 => format!("{name} sends: {}", self.send(side).await),
            4..=6 => {
                self.read(side).await;
                format!("{name} reads")
            }
            7..=8 => format!("{name} sends {}", self.crash_sending(side, polls).await),
            9..=10 => {
                let messenger = self.sides[side].messenger();
                let _ = soon(crash_after(polls, messenger.receive())).await;
                drop(messenger);
                self.sides[side].end().await;
                self.sides[side].start().await;
                format!("{name} receives and ends after {polls} polls")
            }
            11 => {
                self.copy_server().await;
                "the server is copied".to_owned()
            }
            12..=13 => self.restore_server().await,
            14 => {
                self.copy_profile(side).await;
                format!("{name}'s profile is copied")
            }
            _ => self.restore_profile(side).await,
        }
    }

    fn text(&mut self, side: usize) -> String {
        self.next += 1;
        format!("{} {}", NAMES[side], self.next)
    }

    async fn send(&mut self, side: usize) -> String {
        let text = self.text(side);
        let messenger = self.sides[side].messenger();
        let sent = soon(messenger.send(self.sides[side].other, &text)).await;
        let fate = match &sent {
            Ok(sent) if matches!(sent.outcome, SendOutcome::Sent) => Fate::Acknowledged,
            _ => Fate::Unknown,
        };
        self.acknowledged += usize::from(fate == Fate::Acknowledged);
        let description = format!("{text:?}: {sent:?}");
        self.sent.insert(text, (side, fate));
        description
    }

    async fn crash_sending(&mut self, side: usize, polls: usize) -> String {
        let text = self.text(side);
        let messenger = self.sides[side].messenger();
        let sending = messenger.send(self.sides[side].other, &text);
        let sent = soon(crash_after(polls, sending)).await;
        let fate = match sent {
            Some(Ok(sent)) if matches!(sent.outcome, SendOutcome::Sent) => Fate::Acknowledged,
            _ => Fate::Unknown,
        };
        drop(messenger);
        self.sides[side].end().await;
        self.sides[side].start().await;
        let description = format!("{text:?} and ends after {polls} polls: {fate:?}");
        self.sent.insert(text, (side, fate));
        description
    }

    async fn read(&mut self, side: usize) {
        let messenger = self.sides[side].messenger();
        let entries = soon(messenger.receive()).await.unwrap();
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        messenger.mark_seen(&ids).await.unwrap();
        for entry in entries {
            match entry.event {
                Event::Received { text, .. } => *self.shown.entry(text).or_default() += 1,
                Event::Unreadable { from: Some(_), .. } => self.sides[side].unreadable += 1,
                _ => {}
            }
        }
    }

    async fn copy_server(&mut self) {
        if let Some(copy) = self.server_copy.take() {
            fs::remove_dir_all(copy).unwrap();
        }
        self.server_copy = Some(self.server.copy_data().await);
    }

    async fn restore_server(&mut self) -> String {
        let Some(copy) = self.server_copy.clone() else { return "nothing".to_owned() };
        self.server.restore_data(&copy).await;
        self.replace();
        "the server is replaced by its copy".to_owned()
    }

    async fn copy_profile(&mut self, side: usize) {
        let copy = self.copies.path().join(NAMES[side]);
        let _ = fs::remove_dir_all(&copy);
        self.sides[side].end().await;
        copy_dir(&self.sides[side].dir, &copy);
        self.sides[side].start().await;
        self.profile_copies[side] = Some(copy);
    }

    async fn restore_profile(&mut self, side: usize) -> String {
        let Some(copy) = self.profile_copies[side].clone() else { return "nothing".to_owned() };
        self.sides[side].end().await;
        let dir: &Path = &self.sides[side].dir;
        fs::remove_dir_all(dir).unwrap();
        copy_dir(&copy, dir);
        self.sides[side].start().await;
        self.replace();
        format!("{}'s profile is replaced by its copy", NAMES[side])
    }

    /// Notes that something was replaced by an older copy. Earlier messages may be lost or
    /// repeated.
    fn replace(&mut self) {
        self.sent.clear();
        self.sides.iter_mut().for_each(|side| side.unreadable = 0);
        self.replaced += 1;
    }

    /// Checks the messages that were sent since the last replacement, after everything was read.
    fn check(&self) -> Result<(), String> {
        let mut missing = [0, 0];
        for (text, (from, fate)) in &self.sent {
            match (self.shown.get(text).copied().unwrap_or(0), fate) {
                (1, _) | (0, Fate::Unknown) => {}
                (0, Fate::Acknowledged) => missing[1 - from] += 1,
                (times, _) => return Err(format!("{text:?} was shown {times} times")),
            }
        }
        for side in [0, 1] {
            let named = self.sides[side].unreadable;
            if missing[side] > named {
                let name = NAMES[side];
                return Err(format!(
                    "{name} missed {} messages and {named} were named as unreadable: {:?}, {:?}",
                    missing[side], self.sent, self.shown
                ));
            }
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "a longer run is asked for in the environment")]
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[tokio::test]
async fn texts_acknowledged_after_a_restore_are_shown_once_or_reported_as_unreadable() {
    let first = number("QPQ_SEED").unwrap_or(0);
    let (mut acknowledged, mut replaced) = (0, 0);
    for seed in first..first + number("QPQ_SEEDS").unwrap_or(SEEDS) {
        println!("seed {seed}");
        let mut world = Box::pin(World::new(seed)).await;
        for _ in 0..STEPS {
            println!("  {}", Box::pin(world.step()).await);
        }
        for side in [0, 1] {
            println!("  {}", world.send(side).await);
        }
        for side in [0, 1, 0, 1, 0, 1] {
            world.read(side).await;
        }
        world.check().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        acknowledged += world.acknowledged;
        replaced += world.replaced;
    }
    assert!(acknowledged > 0 && replaced > 0, "{acknowledged} sent, {replaced} replaced");
    println!("{acknowledged} acknowledged, {replaced} replacements");
}
