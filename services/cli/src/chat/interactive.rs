//! The chat at a terminal.

use std::{collections::BTreeSet, time::Duration};

use qpq_client::{
    ConnectionEvent, ConversationId, DeliveryState, Entry, Error, Event, safety_number,
};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    Chat, Progress, Sender,
    editor::{self, Editor, Typed},
};
use crate::{
    commands::{
        message,
        requests::{self, Decision},
    },
    entry,
    error::{CliError, Exit},
    output::Style,
    text,
};

/// The number of entries that are shown at the start, unless more are new.
const RECENT: usize = 20;
/// The maximum time for which leaving waits until all messages are sent.
const GOODBYE: Duration = Duration::from_secs(10);
/// The time after which a line without the server's acknowledgement is reported.
const PATIENCE: Duration = Duration::from_secs(3);

pub(super) async fn run(chat: &Chat<'_>) -> Result<(), CliError> {
    let recent = recent(chat).await?;
    let own = recent.iter().filter_map(|entry| match &entry.event {
        Event::Sent { text, .. } if !text.is_empty() => Some(text.clone()),
        _ => None,
    });
    let Ok(editor) = Editor::start(own) else { return super::piped::run(chat, 0).await };
    let style = chat.context.output.style;
    let sender = Sender::start(chat.messenger, chat.conversation);
    let mut screen = Screen {
        chat,
        editor,
        sender,
        style,
        others: BTreeSet::new(),
        is_connected: true,
        is_stuck: false,
    };
    screen.dim(format_args!(
        "Chat with {}, encrypted end to end. /help lists commands, /quit leaves.",
        text::line(&chat.name)
    ));
    screen.show(&recent).await?;
    screen.run().await
}

/// Returns the last entries, among them all that were not seen yet.
async fn recent(chat: &Chat<'_>) -> Result<Vec<Entry>, CliError> {
    let unseen = chat.messenger.unseen().await?;
    let new = unseen.iter().filter(|entry| entry.conversation == Some(chat.conversation)).count();
    Ok(chat.messenger.history(chat.conversation, RECENT.max(new)).await?)
}

/// Returns whether a recent message of ours is not sent yet.
async fn is_unsent(chat: &Chat<'_>) -> Result<bool, Error> {
    let recent = chat.messenger.history(chat.conversation, RECENT).await?;
    Ok(recent
        .iter()
        .any(|entry| matches!(entry.event, Event::Sent { delivery: DeliveryState::Queued, .. })))
}

struct Screen<'a> {
    chat: &'a Chat<'a>,
    editor: Editor,
    sender: Sender,
    style: Style,
    /// Other conversations whose new messages were already announced.
    others: BTreeSet<ConversationId>,
    is_connected: bool,
    /// Whether it was reported that typed messages are not sent for now.
    is_stuck: bool,
}

impl Screen<'_> {
    async fn run(&mut self) -> Result<(), CliError> {
        let mut listener = self.chat.messenger.listen();
        let mut connection = self.chat.messenger.client().connection_events();
        loop {
            let overdue = self.sender.overdue_at(PATIENCE).filter(|_| !self.is_stuck);
            tokio::select! {
                line = self.editor.line() => match line.map(|line| Typed::parse(&line)) {
                    None | Some(Typed::Quit) => return self.leave().await,
                    Some(typed) => self.typed(typed).await,
                },
                progress = self.sender.progress() => self.progressed(progress),
                () = sleep_until(overdue.unwrap_or_else(Instant::now)), if overdue.is_some() => {
                    self.is_stuck = true;
                    self.dim("* saved, but not sent yet: the server does not answer");
                }
                entries = listener.next_all() => match entries {
                    Some(Ok(entries)) => self.arrived(entries).await?,
                    Some(Err(error)) => return self.give_up(error.into()).await,
                    None => return self.leave().await,
                },
                Ok(()) = connection.changed() => {
                    let event = connection.borrow_and_update().clone();
                    self.connection(&event);
                }
            }
        }
    }

    async fn typed(&mut self, typed: Typed) {
        match typed {
            Typed::Nothing | Typed::Quit => {}
            Typed::Text(text) => self.sender.send(text),
            Typed::Help => self.editor.print(editor::HELP),
            Typed::Safety => match self.chat.conversation {
                ConversationId::Direct(peer) => {
                    let number = safety_number(&self.chat.messenger.profile().identity, &peer);
                    self.editor.print(&number);
                }
                ConversationId::Group(_) => {
                    self.dim("A group has no safety number; each of its members has one.");
                }
            },
            Typed::Requests => {
                let lines = requests::lines(self.chat.messenger, self.style).await;
                self.say(lines);
            }
            Typed::Accept(which) => self.decide(&which, Decision::Accept).await,
            Typed::Decline(which) => self.decide(&which, Decision::Decline).await,
            Typed::Unknown(command) => {
                let command = text::line(&command).to_string();
                self.dim(format_args!(
                    "There is no command /{command}. To send it as a text, begin with two slashes."
                ));
            }
        }
    }

    async fn decide(&mut self, which: &str, decision: Decision) {
        let lines = requests::decide_lines(self.chat.messenger, which, decision, self.style).await;
        self.say(lines);
    }

    /// Shows lines, or the error.
    fn say(&mut self, lines: Result<Vec<String>, CliError>) {
        match lines {
            Ok(lines) => lines.iter().for_each(|line| self.editor.print(line)),
            Err(error) => self.dim(format_args!("* {}", error.message)),
        }
    }

    fn progressed(&mut self, progress: Progress) {
        match progress {
            // A refusal has an entry of its own.
            Progress::Saved | Progress::Tried { delivery: DeliveryState::Failed, .. } => {}
            Progress::Tried { delivery: DeliveryState::Sent, .. } => {
                if std::mem::take(&mut self.is_stuck) {
                    self.dim("* sent");
                }
            }
            Progress::Tried { delivery: DeliveryState::Queued, why, .. } => {
                let why = message::queued(why).message;
                if !std::mem::replace(&mut self.is_stuck, true) {
                    self.dim(format_args!("* {why}"));
                }
            }
            Progress::Unsaved { text, why } => {
                let start: String = text::line(&text).to_string().chars().take(20).collect();
                self.dim(format_args!("* not sent ({start}…): {}", why.message));
            }
        }
    }

    async fn arrived(&mut self, entries: Vec<Entry>) -> Result<(), CliError> {
        let (ours, others): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|entry| self.chat.is_ours(entry));
        others.iter().for_each(|entry| self.elsewhere(entry));
        self.show(&ours).await
    }

    /// Reports once that a person has written in another conversation.
    fn elsewhere(&mut self, entry: &Entry) {
        if let (Event::Received { from, .. }, Some(elsewhere)) = (&entry.event, entry.conversation)
            && self.others.insert(elsewhere)
        {
            let place = match elsewhere {
                ConversationId::Direct(_) => "to you",
                ConversationId::Group(_) => "to a group",
            };
            let name = entry::name(from);
            self.dim(format_args!("* {name} has written {place}; `qpq recv` shows it"));
        }
    }

    async fn show(&mut self, entries: &[Entry]) -> Result<(), CliError> {
        for entry in entries {
            let line = self.chat.shown(entry).line(self.style);
            self.editor.print(&line);
        }
        let shown: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        Ok(self.chat.messenger.mark_seen(&shown).await?)
    }

    fn connection(&mut self, event: &ConnectionEvent) {
        let is_connected = match event {
            ConnectionEvent::Connected { .. } => true,
            ConnectionEvent::Reconnecting { .. } => false,
            ConnectionEvent::Idle => return,
        };
        if self.is_connected != is_connected {
            self.dim(if is_connected {
                "· connected again"
            } else {
                "· connection lost, reconnecting…"
            });
        }
        self.is_connected = is_connected;
    }

    /// Shows the error that ends the chat. The editor holds the terminal until a line is typed.
    async fn give_up(&mut self, error: CliError) -> Result<(), CliError> {
        self.dim(format_args!("{}. Press Enter to leave.", error.message));
        self.editor.line().await;
        Err(error)
    }

    /// Leaves once all messages are sent. Fails if some are not sent in time.
    async fn leave(&mut self) -> Result<(), CliError> {
        let chat = self.chat;
        let until = Instant::now() + GOODBYE;
        let rest = async {
            while !self.sender.is_idle() {
                self.sender.progress().await;
            }
            if is_unsent(chat).await? {
                chat.messenger.flush().await?;
            }
            Ok::<_, Error>(())
        };
        // The outcome is the number of texts that remain unsaved or unsent.
        let _ = chat.context.progress.during("sending", timeout_at(until, Box::pin(rest))).await;
        match self.sender.unsaved {
            0 if is_unsent(chat).await? => Err(message::queued(Some(CliError::new(
                Exit::Unreachable,
                "client.unreachable",
                "the server cannot be reached",
            )))),
            0 => Ok(()),
            lost => {
                let message = format!("the last {lost} lines were neither sent nor saved");
                Err(CliError::new(Exit::Unreachable, "client.unreachable", message)
                    .hint("type them again later"))
            }
        }
    }

    fn dim(&mut self, line: impl std::fmt::Display) {
        let line = self.style.dim(line);
        self.editor.print(&line);
    }
}
