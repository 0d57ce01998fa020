//! `qpq dm`: a live conversation. Separate tasks save and send the typed messages, in order, so
//! that neither a slow server nor a lost connection keeps the person from typing or reading.
//!
//! | file | contents |
//! |---|---|
//! | `interactive` | at a terminal |
//! | `piped` | in scripts: lines in, lines out |
//! | `editor` | the line editor, under which incoming lines appear |

mod editor;
mod interactive;
mod piped;

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use qpq_client::{ConversationId, DeliveryState, Entry, EntryId, Error, Messenger};
use qpq_ports::{Clock as _, SystemClock};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};

use crate::{
    args::Recipient,
    commands::{message, opened},
    compose::Context,
    entry::{EntryReport, GroupNames, Place},
    error::CliError,
    output::Format,
};

/// One conversation, while it is shown.
struct Chat<'a> {
    context: &'a Context,
    messenger: &'a Messenger,
    conversation: ConversationId,
    /// The user or the group.
    name: String,
    groups: GroupNames,
}

pub(crate) async fn dm(context: &Context, to: &Recipient, linger: u64) -> Result<(), CliError> {
    let at_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if at_terminal && context.output.format == Format::Human {
        return opened::with(context, async |messenger| {
            // The inbox is read first, to continue a conversation that the other person has begun.
            // Messages that wait are sent later, while the person reads.
            context.progress.during("reading the inbox", Box::pin(messenger.catch_up())).await?;
            let chat = Chat::new(context, messenger, to, None).await?;
            Box::pin(interactive::run(&chat)).await
        })
        .await;
    }
    opened::to_send(context, async |messenger, unreachable| {
        let chat = Chat::new(context, messenger, to, unreachable.as_ref()).await?;
        Box::pin(piped::run(&chat, linger)).await
    })
    .await
    .map_err(message::unsaved)
}

impl<'a> Chat<'a> {
    async fn new(
        context: &'a Context,
        messenger: &'a Messenger,
        to: &Recipient,
        unreachable: Option<&CliError>,
    ) -> Result<Self, CliError> {
        let (conversation, name) = message::resolve(messenger, to, unreachable).await?;
        let groups = GroupNames::of(&messenger.conversations().await?);
        Ok(Self { context, messenger, conversation, name, groups })
    }
}

impl Chat<'_> {
    fn shown<'a>(&'a self, entry: &'a Entry) -> EntryReport<'a> {
        EntryReport { entry, groups: &self.groups, place: Place::Chat, now: SystemClock.now() }
    }

    /// Returns whether an entry belongs to this chat, or to no conversation: the latter is shown in
    /// every chat.
    fn is_ours(&self, entry: &Entry) -> bool {
        entry.conversation.is_none_or(|conversation| conversation == self.conversation)
    }
}

/// The progress of a typed text.
enum Progress {
    /// The message is on this machine's disk, and will be sent even after a crash.
    Saved,
    /// The message was not saved.
    Unsaved { text: String, why: CliError },
    /// An attempt to send the message has ended. If it is still queued, `why` is the reason, as far
    /// as it is known.
    Tried { text: String, entry: EntryId, delivery: DeliveryState, why: Option<CliError> },
}

/// Saves texts in the order of typing, and sends them in the same order. Saving and sending are
/// separate tasks, so a text is saved immediately, even while the one before it waits for the
/// server.
struct Sender {
    texts: mpsc::UnboundedSender<String>,
    progress: mpsc::UnboundedReceiver<Progress>,
    /// The tasks, which end when this value is dropped.
    _tasks: JoinSet<()>,
    unsaved: usize,
    untried: usize,
    /// The time of the latest progress of a text, or of the latest new text.
    moved: Instant,
}

impl Sender {
    fn start(messenger: &Messenger, conversation: ConversationId) -> Self {
        let (texts, given) = mpsc::unbounded_channel();
        let (saved, to_send) = mpsc::unbounded_channel();
        let (updates, progress) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(save(messenger.clone(), conversation, given, saved, updates.clone()));
        tasks.spawn(send(messenger.clone(), to_send, updates));
        Self { texts, progress, _tasks: tasks, unsaved: 0, untried: 0, moved: Instant::now() }
    }

    fn send(&mut self, text: String) {
        if self.is_idle() {
            self.moved = Instant::now();
        }
        // The tasks end only after this sender is dropped.
        if self.texts.send(text).is_ok() {
            self.unsaved += 1;
        }
    }

    /// Returns the next progress. Waits while no text is in progress. Cancel-safe.
    async fn progress(&mut self) -> Progress {
        let Some(progress) = self.progress.recv().await else {
            return std::future::pending().await;
        };
        self.moved = Instant::now();
        match &progress {
            Progress::Saved => {
                self.unsaved -= 1;
                self.untried += 1;
            }
            Progress::Unsaved { .. } => self.unsaved -= 1,
            Progress::Tried { .. } => self.untried -= 1,
        }
        progress
    }

    /// Returns the time at which the texts in progress will have been without progress for
    /// `patience`.
    fn overdue_at(&self, patience: Duration) -> Option<Instant> {
        (self.untried > 0).then(|| self.moved + patience)
    }

    fn is_idle(&self) -> bool {
        self.unsaved == 0 && self.untried == 0
    }
}

type Saved = (String, EntryId);

/// The maximum number of texts that are saved, or sent, before the screen is updated.
const MAX_BATCH: usize = 32;

async fn save(
    messenger: Messenger,
    conversation: ConversationId,
    mut given: mpsc::UnboundedReceiver<String>,
    saved: mpsc::UnboundedSender<Saved>,
    updates: mpsc::UnboundedSender<Progress>,
) {
    // The receiver is closed once the chat has ended.
    let note = |text, outcome: Result<EntryId, Error>| match outcome {
        Ok(entry) => {
            let _ = updates.send(Progress::Saved);
            let _ = saved.send((text, entry));
        }
        Err(error) => {
            let _ = updates.send(Progress::Unsaved { text, why: error.into() });
        }
    };
    let mut texts = Vec::new();
    while given.recv_many(&mut texts, MAX_BATCH).await > 0 {
        if let Ok(entries) = Box::pin(messenger.queue_all(conversation, texts.clone())).await {
            texts.drain(..).zip(entries).for_each(|(text, entry)| note(text, Ok(entry)));
            continue;
        }
        // One of the texts may be the reason, for example because it is too long. The others are
        // sent.
        for text in texts.drain(..) {
            let outcome = Box::pin(messenger.queue(conversation, &text)).await;
            note(text, outcome);
        }
    }
}

async fn send(
    messenger: Messenger,
    mut saved: mpsc::UnboundedReceiver<Saved>,
    updates: mpsc::UnboundedSender<Progress>,
) {
    let mut batch = Vec::new();
    while saved.recv_many(&mut batch, usize::MAX).await > 0 {
        let mut failed: Option<CliError> = None;
        // The texts are sent in parts, so that progress is visible. After a failure the later parts
        // are not tried.
        for some in batch.chunks(MAX_BATCH) {
            if let (None, Some((_, last))) = (&failed, some.last()) {
                failed = Box::pin(messenger.flush_until(*last)).await.err().map(CliError::from);
            }
            for (text, entry) in some {
                let delivery =
                    messenger.delivery(*entry).await.ok().flatten().unwrap_or(DeliveryState::Sent);
                let why = failed.clone().filter(|_| delivery == DeliveryState::Queued);
                let _ = updates.send(Progress::Tried {
                    text: text.clone(),
                    entry: *entry,
                    delivery,
                    why,
                });
            }
        }
        batch.clear();
    }
}
