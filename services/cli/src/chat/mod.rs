//! `qpq dm`: a conversation as it happens. What is typed is sent by a task of its own, in order, so that neither a slow
//! server nor a lost connection keeps the person from typing or reading.
//!
//! | file | what |
//! |---|---|
//! | `interactive` | at a terminal |
//! | `piped` | in scripts: lines in, lines out |
//! | `editor` | the line editor, under which incoming lines appear |

mod editor;
mod interactive;
mod piped;

use std::io::{self, IsTerminal as _};

use qpq_client::{ConversationId, Entry, Error, Messenger, Sent, Username};
use qpq_ports::{Clock as _, SystemClock};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    commands::opened,
    compose::Context,
    entry::{GroupNames, Place, Shown},
    fault::Fault,
    output::Format,
};

/// One conversation with one person, being shown.
struct Chat<'a> {
    context: &'a Context,
    messenger: &'a Messenger,
    conversation: ConversationId,
    user: &'a Username,
    groups: GroupNames,
}

pub(crate) async fn dm(context: &Context, user: &Username, linger: u64) -> Result<(), Fault> {
    opened::with_news(context, async |messenger| {
        let conversation = messenger.conversation_with(user).await?;
        let chat = Chat { context, messenger, conversation, user, groups: GroupNames::default() };
        let at_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
        if at_terminal && context.output.format == Format::Human {
            Box::pin(interactive::run(&chat)).await
        } else {
            Box::pin(piped::run(&chat, linger)).await
        }
    })
    .await
}

impl Chat<'_> {
    fn shown<'a>(&'a self, entry: &'a Entry) -> Shown<'a> {
        Shown { entry, groups: &self.groups, place: Place::Chat, now: SystemClock.now() }
    }

    /// Whether an entry is part of this chat, or of none and so of interest anywhere.
    fn is_ours(&self, entry: &Entry) -> bool {
        entry.conversation.is_none_or(|conversation| conversation == self.conversation)
    }
}

/// What became of a text that was to be sent.
struct Attempt {
    text: String,
    result: Result<Sent, Error>,
}

/// Sends texts one after another.
struct Sender {
    texts: mpsc::UnboundedSender<String>,
    attempts: mpsc::UnboundedReceiver<Attempt>,
    task: JoinHandle<()>,
    pending: usize,
}

impl Sender {
    fn start(messenger: &Messenger, conversation: ConversationId) -> Self {
        let (texts, mut given) = mpsc::unbounded_channel::<String>();
        let (tried, attempts) = mpsc::unbounded_channel();
        let messenger = messenger.clone();
        let task = tokio::spawn(async move {
            while let Some(text) = given.recv().await {
                let result = Box::pin(messenger.send(conversation, &text)).await;
                if tried.send(Attempt { text, result }).is_err() {
                    return;
                }
            }
        });
        Self { texts, attempts, task, pending: 0 }
    }

    fn send(&mut self, text: String) {
        // The task ends only after this sender is gone.
        if self.texts.send(text).is_ok() {
            self.pending += 1;
        }
    }

    /// The next attempt that came to its end; waits for ever while none is under way. Cancel-safe.
    async fn attempted(&mut self) -> Attempt {
        match self.attempts.recv().await {
            Some(attempt) => {
                self.pending -= 1;
                attempt
            }
            None => std::future::pending().await,
        }
    }

    fn is_idle(&self) -> bool {
        self.pending == 0
    }
}

impl Drop for Sender {
    /// What is not saved by now was never shown as sent.
    fn drop(&mut self) {
        self.task.abort();
    }
}
