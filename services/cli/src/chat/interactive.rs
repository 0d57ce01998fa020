//! The chat at a terminal.

use std::{collections::BTreeSet, time::Duration};

use qpq_client::{ConnectionEvent, ConversationId, Delivery, Entry, Error, Event, Outcome, safety_number};
use tokio::time::{Instant, timeout_at};

use super::{
    Attempt, Chat, Sender,
    editor::{self, Editor, Typed},
};
use crate::{commands::message, entry, fault::Fault, output::Style, text};

/// Entries shown at the start, unless more are new.
const RECENT: usize = 20;
/// How long leaving waits for what is still being sent.
const GOODBYE: Duration = Duration::from_secs(10);

pub(super) async fn run(chat: &Chat<'_>) -> Result<(), Fault> {
    let recent = recent(chat).await?;
    let own = recent.iter().filter_map(|entry| match &entry.event {
        Event::Sent { text, .. } => Some(text.clone()),
        _ => None,
    });
    let Ok(editor) = Editor::start(own) else { return super::piped::run(chat, 0).await };
    let style = chat.context.output.style;
    let sender = Sender::start(chat.messenger, chat.conversation);
    let mut screen = Screen { chat, editor, sender, style, others: BTreeSet::new(), is_connected: true };
    screen.dim(format_args!(
        "Chat with {}, encrypted end to end. /help lists commands, /quit leaves.",
        chat.user
    ));
    screen.show(&recent).await?;
    screen.run().await
}

/// The last entries, and every one that was not seen yet.
async fn recent(chat: &Chat<'_>) -> Result<Vec<Entry>, Fault> {
    let unseen = chat.messenger.unseen().await?;
    let new = unseen.iter().filter(|entry| entry.conversation == Some(chat.conversation)).count();
    Ok(chat.messenger.history(chat.conversation, RECENT.max(new)).await?)
}

/// Whether something that was written here lately is still to be sent.
async fn is_unsent(chat: &Chat<'_>) -> Result<bool, Error> {
    let recent = chat.messenger.history(chat.conversation, RECENT).await?;
    Ok(recent.iter().any(|entry| matches!(entry.event, Event::Sent { delivery: Delivery::Queued, .. })))
}

struct Screen<'a> {
    chat: &'a Chat<'a>,
    editor: Editor,
    sender: Sender,
    style: Style,
    /// Who was already said to have written elsewhere.
    others: BTreeSet<ConversationId>,
    is_connected: bool,
}

impl Screen<'_> {
    async fn run(&mut self) -> Result<(), Fault> {
        let mut listener = self.chat.messenger.listen();
        let mut connection = self.chat.messenger.client().connection_events();
        loop {
            tokio::select! {
                line = self.editor.line() => match line.map(|line| Typed::parse(&line)) {
                    None | Some(Typed::Quit) => return self.leave().await,
                    Some(typed) => self.typed(typed),
                },
                attempt = self.sender.attempted() => self.attempted(attempt),
                entry = listener.next() => match entry {
                    Some(Ok(entry)) => self.arrived(entry).await?,
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

    fn typed(&mut self, typed: Typed) {
        match typed {
            Typed::Nothing | Typed::Quit => {}
            Typed::Text(text) => self.sender.send(text),
            Typed::Help => self.editor.print(&editor::help(self.chat.user)),
            Typed::Safety => {
                if let ConversationId::Direct(peer) = self.chat.conversation {
                    let number = safety_number(&self.chat.messenger.profile().identity, &peer);
                    self.editor.print(&number);
                }
            }
            Typed::Unknown(command) => {
                let command = text::line(&command).to_string();
                self.dim(format_args!(
                    "There is no command /{command}. To send it as a text, begin with two slashes."
                ));
            }
        }
    }

    fn attempted(&mut self, attempt: Attempt) {
        let fault = match attempt.result {
            // A refusal comes as an entry of its own.
            Ok(sent) if matches!(sent.outcome, Outcome::Sent | Outcome::Refused) => return,
            Ok(sent) => match sent.outcome {
                Outcome::Queued(Some(error)) if error.is_temporary() => {
                    return self.dim("Not sent yet; it will be as soon as the server can be reached.");
                }
                Outcome::Queued(why) => message::queued(why),
                Outcome::Sent | Outcome::Refused => return,
            },
            Err(error) => error.into(),
        };
        let said = text::line(&attempt.text).to_string();
        let start: String = said.chars().take(20).collect();
        self.dim(format_args!("Not sent ({start}…): {}", fault.message));
    }

    async fn arrived(&mut self, entry: Entry) -> Result<(), Fault> {
        if self.chat.is_ours(&entry) {
            return self.show(&[entry]).await;
        }
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
        Ok(())
    }

    async fn show(&mut self, entries: &[Entry]) -> Result<(), Fault> {
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
            self.dim(if is_connected { "· connected again" } else { "· connection lost, reconnecting…" });
        }
        self.is_connected = is_connected;
    }

    /// Says why it cannot go on. The editor holds the terminal until a line is typed.
    async fn give_up(&mut self, fault: Fault) -> Result<(), Fault> {
        self.dim(format_args!("{}. Press Enter to leave.", fault.message));
        self.editor.line().await;
        Err(fault)
    }

    /// Leaves once all is sent, or says that it is not.
    async fn leave(&mut self) -> Result<(), Fault> {
        let chat = self.chat;
        let until = Instant::now() + GOODBYE;
        let rest = async {
            while !self.sender.is_idle() {
                self.sender.attempted().await;
            }
            if is_unsent(chat).await? {
                chat.messenger.flush().await?;
            }
            Ok::<_, Error>(())
        };
        let ended = chat.context.progress.during("sending", timeout_at(until, rest)).await;
        if !matches!(ended, Ok(Ok(()))) || is_unsent(chat).await? {
            chat.context.output.note("Something is saved but not sent yet; the next qpq command sends it.");
        }
        Ok(())
    }

    fn dim(&mut self, line: impl std::fmt::Display) {
        let line = self.style.dim(line);
        self.editor.print(&line);
    }
}
