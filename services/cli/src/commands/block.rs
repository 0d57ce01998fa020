//! `qpq block`, `qpq unblock`, `qpq blocked`: users whose messages are refused.

use std::io::{self, Write};

use qpq_client::{Error, Messenger, Person};
use serde::Serialize;

use super::opened;
use crate::{
    args::PersonArg,
    compose::Context,
    entry::{self, PersonObject},
    error::{CliError, Exit},
    output::{Report, Style},
};

#[derive(Debug, Serialize)]
struct Changed<'a> {
    event: &'static str,
    #[serde(flatten)]
    person: PersonObject<'a>,
    /// Whether the server knows the change.
    at_server: bool,
    #[serde(skip)]
    shown: String,
}

impl Report for Changed<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let name = style.bold(&self.shown);
        match self.event {
            "blocked" => writeln!(out, "{name} is blocked."),
            _ => writeln!(out, "{name} is not blocked any more."),
        }
    }
}

#[derive(Debug, Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    person: PersonObject<'a>,
    #[serde(skip)]
    shown: String,
}

impl Report for Listed<'_> {
    fn human(&self, out: &mut dyn Write, _: Style) -> io::Result<()> {
        writeln!(out, "{}", self.shown)
    }
}

pub(crate) async fn block(context: &Context, person: &PersonArg) -> Result<(), CliError> {
    opened::locally(context, async |messenger, unreachable| {
        let is_reachable = unreachable.is_none();
        let identity = match (person.key, &person.user) {
            (Some(key), _) => key,
            (None, Some(user)) => match unreachable {
                Some(error) => return Err(error),
                None => messenger.resolve(user).await.map_err(by_key)?.identity,
            },
            (None, None) => unreachable!("one of them is required"),
        };
        let person = messenger.block(identity).await?;
        let at_server = inform_server(context, messenger, is_reachable).await;
        report(context, "blocked", &person, at_server)
    })
    .await
}

/// Adds the keys to the error about a name with a new key, since the name does not identify the
/// person.
fn by_key(error: Error) -> CliError {
    match &error {
        Error::IdentityChanged { known, now, .. } => {
            let hint = format!(
                "say which one: `qpq block --key {known}` (the known one) or `qpq block --key {now}`"
            );
            CliError::from(error).hint(hint)
        }
        _ => error.into(),
    }
}

pub(crate) async fn unblock(context: &Context, person: &PersonArg) -> Result<(), CliError> {
    opened::locally(context, async |messenger, unreachable| {
        let found = find(messenger, person).await?;
        let [person] = &found[..] else {
            let (code, message, hint) = match found.len() {
                0 => ("client.not_blocked", "nobody of this name or key is blocked", ""),
                _ => (
                    "client.ambiguous_person",
                    "several people of this name are blocked",
                    "give one's identity with --key; ",
                ),
            };
            let hint = format!("{hint}see `qpq blocked --json`");
            return Err(CliError::new(Exit::Failure, code, message).hint(hint));
        };
        messenger.unblock(person.identity).await?;
        let at_server = inform_server(context, messenger, unreachable.is_none()).await;
        report(context, "unblocked", person, at_server)
    })
    .await
}

async fn find(messenger: &Messenger, wanted: &PersonArg) -> Result<Vec<Person>, Error> {
    let is_wanted = |person: &Person| match (&wanted.key, &wanted.user) {
        (Some(key), _) => person.identity == *key,
        (None, user) => user.as_ref() == Some(&person.username),
    };
    Ok(messenger.blocked().await?.into_iter().filter(is_wanted).collect())
}

pub(crate) async fn list(context: &Context) -> Result<(), CliError> {
    opened::locally(context, async |messenger, _| {
        let blocked = messenger.blocked().await?;
        for person in &blocked {
            let shown = entry::name(person);
            context.output.report(&Listed { person: person.into(), shown })?;
        }
        if blocked.is_empty() {
            context.output.note("Nobody is blocked.");
        }
        Ok(())
    })
    .await
}

/// Informs the server of the change, which is saved here. Returns whether the server knows it.
async fn inform_server(context: &Context, messenger: &Messenger, is_reachable: bool) -> bool {
    let later = "The server does not know yet, and is informed by the next `qpq recv`.";
    if !is_reachable {
        context.output.note(later);
        return false;
    }
    match messenger.send_blocks().await {
        Ok(()) => true,
        Err(error) if opened::is_temporary(&error) => {
            context.output.note(format_args!("{later} It answered: {error}"));
            false
        }
        Err(error) => {
            context.output.note(format_args!(
                "The server did not accept the change, which holds on your devices alone: {error}"
            ));
            false
        }
    }
}

fn report(
    context: &Context,
    event: &'static str,
    person: &Person,
    at_server: bool,
) -> Result<(), CliError> {
    let shown = entry::name(person);
    context.output.report(&Changed { event, person: person.into(), at_server, shown })
}
