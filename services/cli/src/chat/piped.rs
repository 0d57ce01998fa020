//! The chat in a script: each line of standard input is a message, each incoming one a line of
//! standard output.

use std::{future::pending, time::Duration};

use qpq_client::{DeliveryState, Entry};
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, stdin},
    time::{Instant, sleep_until},
};

use super::{Chat, Progress, Sender};
use crate::{
    commands::message,
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

/// The result of a line, for programs.
#[derive(Debug, Serialize)]
struct SentLine<'a> {
    event: &'static str,
    id: u64,
    text: &'a str,
}

impl Report for SentLine<'_> {
    /// Prints nothing: people see their own input.
    fn human(&self, _: &mut dyn std::io::Write, _: Style) -> std::io::Result<()> {
        Ok(())
    }
}

pub(super) async fn run(chat: &Chat<'_>, linger: u64) -> Result<(), CliError> {
    let mut script =
        Script { chat, sender: Sender::start(chat.messenger, chat.conversation), failed: None };
    let mut lines = BufReader::new(stdin()).lines();
    let mut listener = chat.messenger.listen();
    let mut input = Input::Open;
    loop {
        if input == Input::Ended && script.sender.is_idle() {
            input = Input::Lingering(Instant::now() + Duration::from_secs(linger));
        }
        tokio::select! {
            line = lines.next_line(), if input == Input::Open => match line {
                Ok(Some(line)) if line.trim().is_empty() => {}
                Ok(Some(line)) => script.sender.send(line),
                Ok(None) => input = Input::Ended,
                Err(error) => return Err(CliError::io("standard input", &error)),
            },
            progress = script.sender.progress() => script.progressed(progress)?,
            entries = listener.next_all() => match entries {
                Some(entries) => script.arrived(&entries?).await?,
                None => break,
            },
            () = over(input) => break,
        }
    }
    match script.failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    Open,
    /// All input is read, and some of the input is not sent yet.
    Ended,
    Lingering(Instant),
}

async fn over(input: Input) {
    match input {
        Input::Lingering(until) => sleep_until(until).await,
        _ => pending().await,
    }
}

struct Script<'a> {
    chat: &'a Chat<'a>,
    sender: Sender,
    /// The error of the first line that was not sent.
    failed: Option<CliError>,
}

impl Script<'_> {
    fn progressed(&mut self, progress: Progress) -> Result<(), CliError> {
        let error = match progress {
            Progress::Saved => return Ok(()),
            Progress::Tried { text, entry, delivery: DeliveryState::Sent, .. } => {
                let sent = SentLine { event: "sent", id: entry.0, text: &text };
                return self.chat.context.output.report(&sent);
            }
            Progress::Tried { delivery: DeliveryState::Queued, why, .. } => message::queued(why),
            Progress::Tried { delivery: DeliveryState::Failed, .. } => {
                let message = format!("not delivered to {}", text::line(&self.chat.name));
                CliError::new(Exit::Failure, "client.not_delivered", message)
            }
            Progress::Unsaved { why, .. } => why,
        };
        self.failed.get_or_insert(error);
        Ok(())
    }

    async fn arrived(&mut self, entries: &[Entry]) -> Result<(), CliError> {
        let mut shown = Vec::new();
        for entry in entries.iter().filter(|entry| self.chat.is_ours(entry)) {
            self.chat.context.output.report(&self.chat.shown(entry))?;
            shown.push(entry.id);
        }
        Ok(self.chat.messenger.mark_seen(&shown).await?)
    }
}
