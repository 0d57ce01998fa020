//! `qpq send` and `qpq recv`: sends one message, shows received ones.

use std::{
    io::{self, IsTerminal as _, Write},
    time::Duration,
};

use qpq_client::{
    ConversationId, Entry, EntryId, Error, Event, Listener, Messenger, SendOutcome, Sent, Username,
};
use qpq_ports::{Clock as _, SystemClock};
use serde::Serialize;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    find::{find, matching},
    opened,
};
use crate::{
    args::Recipient,
    compose::Context,
    entry::{EntryReport, GroupNames, Place},
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

#[derive(Debug, Serialize)]
struct Delivered<'a> {
    event: &'static str,
    id: u64,
    to: &'a str,
    conversation: String,
}

impl Report for Delivered<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        writeln!(out, "{}", style.dim(format_args!("Sent to {}.", text::line(self.to))))
    }
}

pub(crate) async fn send(
    context: &Context,
    to: &Recipient,
    given: Option<String>,
) -> Result<(), CliError> {
    let body = body(context, given).await?;
    opened::to_send(context, async |messenger, unreachable| {
        let (conversation, name) = resolve(messenger, to, unreachable.as_ref()).await?;
        deliver(context, messenger, conversation, &name, &body, unreachable).await
    })
    .await
    .map_err(unsaved)
}

/// Returns the text from the command line or standard input, without the line end that closes it.
pub(crate) async fn body(context: &Context, given: Option<String>) -> Result<String, CliError> {
    let mut text = match given {
        Some(text) if text != "-" => text,
        _ => {
            if io::stdin().is_terminal() {
                context.output.note("Type the message; Ctrl-D on a line of its own ends it.");
            }
            // On a thread of its own, so that Ctrl-C works.
            tokio::task::spawn_blocking(|| io::read_to_string(io::stdin()))
                .await
                .expect("reading does not panic")
                .map_err(|error| CliError::io("standard input", &error))?
        }
    };
    if let Some(line) = text.strip_suffix('\n') {
        text.truncate(line.strip_suffix('\r').unwrap_or(line).len());
    }
    if text.trim().is_empty() {
        return Err(CliError::usage("there is nothing to send")
            .hint("give a text, or `-` and a text on standard input"));
    }
    Ok(text)
}

/// The maximum time to prepare a message while the server is known to be unreachable.
const OFFLINE_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends a message, and reports the outcome. If the server is `unreachable`, the message is saved.
pub(crate) async fn deliver(
    context: &Context,
    messenger: &Messenger,
    conversation: ConversationId,
    to: &str,
    body: &str,
    unreachable: Option<CliError>,
) -> Result<(), CliError> {
    if let Some(why) = unreachable {
        // A first message needs the server for the recipient's KeyPackage.
        return match timeout(OFFLINE_TIMEOUT, messenger.queue(conversation, body)).await {
            Ok(Ok(_)) => Err(queued(Some(why))),
            Ok(Err(error)) if !opened::is_temporary(&error) => Err(error.into()),
            Ok(Err(_)) | Err(_) => Err(why),
        };
    }
    let sent =
        context.progress.during("sending", Box::pin(messenger.send(conversation, body))).await?;
    report(context, messenger, conversation, to, sent).await
}

/// Reports the outcome of a message.
pub(super) async fn report(
    context: &Context,
    messenger: &Messenger,
    conversation: ConversationId,
    to: &str,
    Sent { entry, outcome }: Sent,
) -> Result<(), CliError> {
    match outcome {
        SendOutcome::Sent => context.output.report(&Delivered {
            event: "sent",
            id: entry.0,
            to,
            conversation: conversation.to_string(),
        }),
        SendOutcome::Queued(why) => Err(queued(why.map(CliError::from))),
        SendOutcome::Refused => Err(refused(messenger, conversation).await?),
    }
}

/// The code of the error about a message that is saved and not yet sent.
const QUEUED: &str = "client.queued";

/// Adds to an error that the message was not saved, if the server was unreachable before that.
pub(crate) fn unsaved(mut error: CliError) -> CliError {
    if error.exit == Exit::Unreachable && error.code != QUEUED {
        error.message += "; the message is neither sent nor saved";
    }
    error
}

/// Returns the error for a message that is saved and not yet sent.
pub(crate) fn queued(why: Option<CliError>) -> CliError {
    let (exit, why) = match why {
        Some(error) => (error.exit, error.message),
        None => (Exit::Failure, "the server has not accepted it".to_owned()),
    };
    CliError::new(exit, QUEUED, format_args!("saved, but not sent yet: {why}"))
        .hint("whatever qpq command you run next sends it; do not send it again")
}

async fn refused(messenger: &Messenger, conversation: ConversationId) -> Result<CliError, Error> {
    let unseen = messenger.unseen().await?;
    let reasons: Vec<_> = unseen
        .iter()
        .filter(|entry| entry.conversation == Some(conversation))
        .filter_map(|entry| match &entry.event {
            Event::Undeliverable { to, reason } => {
                Some((entry.id, format!("to {to}: {}", text::line(reason))))
            }
            _ => None,
        })
        .collect();
    let (ids, reasons): (Vec<EntryId>, Vec<String>) = reasons.into_iter().unzip();
    messenger.mark_seen(&ids).await?;
    Ok(CliError::new(
        Exit::Failure,
        "client.not_delivered",
        format_args!("not delivered {}", reasons.join("; ")),
    ))
}

/// Returns the conversation with the given user or group, and its name. A group that another user
/// has named like a user must not receive the messages for the user.
pub(crate) async fn resolve(
    messenger: &Messenger,
    to: &Recipient,
    unreachable: Option<&CliError>,
) -> Result<(ConversationId, String), CliError> {
    let name = match to {
        Recipient::User(user) => {
            return Ok((with_user(messenger, user, unreachable).await?, user.to_string()));
        }
        Recipient::Either(name) => name,
    };
    let conversations = messenger.conversations().await?;
    let user = Username::parse(name);
    if matching(&conversations, name).is_empty() {
        let user = user.map_err(|error| {
            CliError::usage(format_args!(
                "{} is not one of your groups and cannot be a username: {error}",
                text::line(name)
            ))
        })?;
        return Ok((with_user(messenger, &user, unreachable).await?, user.to_string()));
    }
    let Ok(user) = user else { return find(&conversations, name) };
    let is_user = match (unreachable, messenger.known(&user).await?) {
        (_, Some(_)) => true,
        (Some(_), None) => false,
        (None, None) => match messenger.resolve(&user).await {
            Err(Error::NoSuchUser(_)) => false,
            Err(error) => return Err(error.into()),
            Ok(_) => true,
        },
    };
    if !is_user {
        return find(&conversations, name);
    }
    Err(CliError::new(
        Exit::Failure,
        "client.ambiguous_recipient",
        format_args!("{user} is a user, and you are in a group of that name"),
    )
    .hint(format!("name the user `@{user}`, or the group by the id that `qpq group list` shows")))
}

/// Returns the conversation with a user. A known user can be written to even if the server cannot
/// be asked about the name now.
async fn with_user(
    messenger: &Messenger,
    user: &Username,
    unreachable: Option<&CliError>,
) -> Result<ConversationId, CliError> {
    let why = match unreachable {
        Some(why) => why.clone(),
        None => match messenger.conversation_with(user).await {
            Err(error) if opened::is_temporary(&error) => error.into(),
            found => return Ok(found?),
        },
    };
    let known = messenger.known(user).await?;
    known.map(|person| ConversationId::Direct(person.identity)).ok_or(why)
}

pub(crate) async fn recv(
    context: &Context,
    follow: bool,
    seconds: Option<u64>,
) -> Result<(), CliError> {
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    opened::with(context, async |messenger| {
        let mut reader = Reader { context, messenger, groups: GroupNames::default() };
        let there =
            context.progress.during("reading the inbox", Box::pin(messenger.receive())).await?;
        if follow {
            // The listener begins with the same entries.
            return reader.follow(until).await;
        }
        reader.show(&there).await?;
        match until {
            Some(until) if there.is_empty() => return reader.wait(until).await,
            None if there.is_empty() => context.output.note("No new messages."),
            _ => {}
        }
        Ok(())
    })
    .await
}

/// Shows entries and marks them as seen.
struct Reader<'a> {
    context: &'a Context,
    messenger: &'a Messenger,
    groups: GroupNames,
}

impl Reader<'_> {
    /// Shows entries as they arrive, until the time is over or the command is interrupted.
    async fn follow(&mut self, until: Option<Instant>) -> Result<(), CliError> {
        let mut listener = self.messenger.listen();
        while let Some(entries) = next(&mut listener, until).await? {
            self.show(&entries).await?;
        }
        Ok(())
    }

    /// Waits for the first entries.
    async fn wait(&mut self, until: Instant) -> Result<(), CliError> {
        let mut listener = self.messenger.listen();
        match next(&mut listener, Some(until)).await? {
            Some(entries) => self.show(&entries).await,
            None => Err(CliError::new(Exit::Nothing, "client.nothing", "nothing arrived in time")),
        }
    }

    async fn show(&mut self, entries: &[Entry]) -> Result<(), CliError> {
        if !entries.iter().all(|entry| self.groups.knows(entry.conversation)) {
            self.groups = GroupNames::of(&self.messenger.conversations().await?);
        }
        let now = SystemClock.now();
        for entry in entries {
            self.context.output.report(&EntryReport {
                entry,
                groups: &self.groups,
                place: Place::Anywhere,
                now,
            })?;
        }
        let shown: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        Ok(self.messenger.mark_seen(&shown).await?)
    }
}

/// Returns the next entries, or `None` when the time is over.
async fn next(
    listener: &mut Listener,
    until: Option<Instant>,
) -> Result<Option<Vec<Entry>>, CliError> {
    let over = async {
        match until {
            Some(until) => sleep_until(until).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        entries = listener.next_all() => Ok(entries.transpose()?),
        () = over => Ok(None),
    }
}
