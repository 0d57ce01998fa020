//! `qpq group`: creates groups, adds members, lists both, and finds the group that is meant.

use std::io::{self, Write};

use qpq_client::{
    Conversation, ConversationId, ConversationKind, Error, Membership, Messenger, MlsError,
    SendOutcome, Username,
};
use serde::Serialize;

use super::{find::find, message, opened};
use crate::{
    compose::Context,
    entry::{self, PersonObject},
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

#[derive(Debug, Serialize)]
struct Changed {
    event: &'static str,
    name: String,
    id: String,
    /// The members that this command added.
    added: Vec<String>,
}

impl Report for Changed {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let name = style.bold(text::line(&self.name));
        let added = text::list(&self.added);
        match (self.event, self.added.is_empty()) {
            ("group_created", true) => {
                writeln!(out, "Created group {name}. Add members: qpq group add {name} USER…")
            }
            ("group_created", false) => writeln!(out, "Created group {name} with {added}."),
            _ => writeln!(out, "Added {added} to {name}."),
        }
    }
}

pub(crate) async fn create(
    context: &Context,
    name: &str,
    members: &[Username],
) -> Result<(), CliError> {
    opened::to_send(context, async |messenger, unreachable| {
        if let Some(error) = unreachable {
            return Err(error);
        }
        // A name that nobody has is found before there is a group.
        for member in members {
            messenger.conversation_with(member).await?;
        }
        let group = messenger.create_group(name).await?;
        add_all(messenger, group, name, members).await?;
        report(context, "group_created", group, name, members)
    })
    .await
}

pub(crate) async fn add(
    context: &Context,
    group: &str,
    members: &[Username],
) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let (id, name) = find(&messenger.conversations().await?, group)?;
        add_all(messenger, id, &name, members).await?;
        report(context, "members_added", id, &name, members)
    })
    .await
}

#[derive(Debug, Serialize)]
struct Left {
    event: &'static str,
    name: String,
    id: String,
}

impl Report for Left {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        writeln!(out, "You have left the group {}.", style.bold(text::line(&self.name)))
    }
}

pub(crate) async fn leave(context: &Context, group: &str) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let (group, name) = find(&messenger.conversations().await?, group)?;
        // Where the server does not take the farewell now, the next command sends it.
        messenger.leave(group).await?;
        context.output.report(&Left { event: "group_left", name, id: group.to_string() })
    })
    .await
}

async fn add_all(
    messenger: &Messenger,
    group: ConversationId,
    name: &str,
    members: &[Username],
) -> Result<(), CliError> {
    for member in members {
        let added = match Box::pin(messenger.add(group, member)).await {
            Ok(outcome) => outcome,
            Err(Error::Mls(MlsError::AlreadyMember(_))) => {
                let message = format!("{member} is in the group {} already", text::line(name));
                return Err(CliError::new(Exit::Failure, "client.already_member", message));
            }
            Err(error) => return Err(error.into()),
        };
        match added {
            SendOutcome::Sent => {}
            SendOutcome::Queued(why) => return Err(message::queued(why.map(CliError::from))),
            SendOutcome::Refused => {
                let message = format!("the server does not take messages for {member}");
                return Err(CliError::new(Exit::Failure, "client.not_delivered", message));
            }
        }
    }
    Ok(())
}

fn report(
    context: &Context,
    event: &'static str,
    group: ConversationId,
    name: &str,
    members: &[Username],
) -> Result<(), CliError> {
    let added = members.iter().map(ToString::to_string).collect();
    context.output.report(&Changed { event, name: name.to_owned(), id: group.to_string(), added })
}

pub(crate) async fn send(
    context: &Context,
    group: &str,
    given: Option<String>,
) -> Result<(), CliError> {
    let body = message::body(context, given).await?;
    opened::to_send(context, async |messenger, unreachable| {
        let (id, name) = find(&messenger.conversations().await?, group)?;
        message::deliver(context, messenger, id, &name, &body, unreachable).await
    })
    .await
    .map_err(message::unsaved)
}

#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    id: String,
    /// Called `maker` since the first release.
    #[serde(rename = "maker")]
    creator: String,
    members: usize,
    unseen: usize,
    /// Whether one is still in it.
    member: bool,
}

impl Report for Listed {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { id, creator, members, unseen, .. } = self;
        let name = style.bold(text::line(&self.name));
        let news = match unseen {
            0 => String::new(),
            many => format!(", {many} new"),
        };
        let gone = if self.member { "" } else { ", you are no longer in it" };
        writeln!(
            out,
            "{name}  {members} members, created by {creator}{news}{gone}  {}",
            style.dim(format_args!("{id:.8}"))
        )
    }
}

pub(crate) async fn list(context: &Context) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let mut found = false;
        for Conversation { id, kind, unseen, .. } in messenger.conversations().await? {
            let ConversationKind::Group { name, creator, members, membership } = kind else {
                continue;
            };
            found = true;
            context.output.report(&Listed {
                name,
                id: id.to_string(),
                creator: entry::name(&creator),
                members,
                unseen,
                member: membership == Membership::Member,
            })?;
        }
        if !found {
            context.output.note("You are in no group. Create one: qpq group create NAME USER…");
        }
        Ok(())
    })
    .await
}

#[derive(Debug, Serialize)]
struct Member<'a> {
    #[serde(flatten)]
    person: PersonObject<'a>,
    #[serde(rename = "maker")]
    creator: bool,
    #[serde(skip)]
    shown: String,
}

impl Report for Member<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let made = if self.creator { style.dim("  created the group") } else { String::new() };
        writeln!(out, "{}{made}", self.shown)
    }
}

pub(crate) async fn members(context: &Context, group: &str) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let conversations = messenger.conversations().await?;
        let (id, _) = find(&conversations, group)?;
        let found = conversations.iter().find(|conversation| conversation.id == id);
        let creator = found.and_then(|conversation| match &conversation.kind {
            ConversationKind::Group { creator, .. } => Some(creator.identity),
            ConversationKind::Direct { .. } => None,
        });
        for person in messenger.members(id).await? {
            let shown = entry::name(&person);
            let is_creator = creator == Some(person.identity);
            let person = (&person).into();
            context.output.report(&Member { person, creator: is_creator, shown })?;
        }
        Ok(())
    })
    .await
}
