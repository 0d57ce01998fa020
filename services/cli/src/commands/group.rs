//! `qpq group`: creates and changes groups, and shows them.

use std::io::{self, Write};

use qpq_client::{
    Conversation, ConversationId, ConversationKind, Error, GroupMember, Membership, Messenger,
    MlsError, Role, SendOutcome, UnixMillis, Username,
};
use serde::Serialize;

use super::{find::find, message, moderate, opened};
use crate::{
    args::{BanDuration, GroupCommand},
    compose::Context,
    entry::{self, PersonObject},
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

/// Runs one command about groups.
pub(super) async fn run(context: &Context, command: GroupCommand) -> Result<(), CliError> {
    match command {
        GroupCommand::Create { name, members } => create(context, &name, &members).await,
        GroupCommand::Invite { group, members } => invite(context, &group, &members).await,
        GroupCommand::Remove { group, members } => remove(context, &group, &members).await,
        GroupCommand::Ban { group, member, reason, duration } => {
            ban(context, &group, &member, &reason, duration).await
        }
        GroupCommand::Unban { group, member } => unban(context, &group, &member).await,
        GroupCommand::Bans { group } => bans(context, &group).await,
        GroupCommand::Rename { group, name } => rename(context, &group, &name).await,
        GroupCommand::Admin { group, member, revoke } => {
            let role = if revoke { Role::Member } else { Role::Admin };
            set_role(context, &group, &member, role).await
        }
        GroupCommand::Rejoin { group } => rejoin(context, &group).await,
        GroupCommand::Rotate { group, reason } => rotate(context, &group, &reason).await,
        GroupCommand::Send { group, text } => send(context, &group, text).await,
        GroupCommand::Leave { group } => leave(context, &group).await,
        GroupCommand::List => list(context).await,
        GroupCommand::Show { group } => show(context, &group).await,
        GroupCommand::Members { group } => members(context, &group).await,
    }
}

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
                writeln!(out, "Created group {name}. Add members: qpq group invite {name} USER…")
            }
            ("group_created", false) => writeln!(out, "Created group {name} with {added}."),
            _ => writeln!(out, "Added {added} to {name}."),
        }
    }
}

async fn create(context: &Context, name: &str, members: &[Username]) -> Result<(), CliError> {
    opened::to_send(context, async |messenger, unreachable| {
        if let Some(error) = unreachable {
            return Err(error);
        }
        // An unknown username is found before the group is created.
        for member in members {
            messenger.conversation_with(member).await?;
        }
        let group = messenger.create_group(name).await?;
        add_all(messenger, group, name, members).await?;
        report(context, "group_created", group, name, members)
    })
    .await
}

async fn invite(context: &Context, group: &str, members: &[Username]) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let (id, name) = find(&messenger.conversations().await?, group)?;
        add_all(messenger, id, &name, members).await?;
        report(context, "members_added", id, &name, members)
    })
    .await
}

/// The report of a change of a group other than new members.
#[derive(Debug, Serialize)]
struct Done {
    event: &'static str,
    name: String,
    id: String,
    /// The changed members.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    members: Vec<String>,
}

impl Report for Done {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let name = style.bold(text::line(&self.name));
        let members = text::list(&self.members);
        match self.event {
            "members_removed" => writeln!(out, "Removed {members} from {name}."),
            "member_banned" => writeln!(out, "{members} is banned from {name}."),
            "member_unbanned" => writeln!(out, "{members} is not banned from {name}."),
            "group_renamed" => writeln!(out, "The group is now named {name}."),
            "member_promoted" => writeln!(out, "{members} is now an admin of {name}."),
            "member_demoted" => writeln!(out, "{members} is no longer an admin of {name}."),
            "group_rejoined" => writeln!(out, "Joined {name} again."),
            "rotation_requested" => {
                writeln!(out, "The members of {name} were asked to renew their keys.")
            }
            _ => writeln!(out, "You have left the group {name}."),
        }
    }
}

/// Changes the group of a name or id, and reports the change.
async fn change(
    context: &Context,
    group: &str,
    event: &'static str,
    members: &[Username],
    work: impl AsyncFnOnce(&Messenger, ConversationId) -> Result<SendOutcome, CliError>,
) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let (id, name) = find(&messenger.conversations().await?, group)?;
        if let SendOutcome::Queued(why) = work(messenger, id).await? {
            return Err(message::queued(why.map(CliError::from)));
        }
        let name = match &messenger.conversations().await?.iter().find(|one| one.id == id) {
            Some(Conversation { kind: ConversationKind::Group { name, .. }, .. }) => name.clone(),
            _ => name,
        };
        let members = members.iter().map(ToString::to_string).collect();
        context.output.report(&Done { event, name, id: id.to_string(), members })
    })
    .await
}

async fn remove(context: &Context, group: &str, members: &[Username]) -> Result<(), CliError> {
    change(context, group, "members_removed", members, async |messenger, id| {
        let mut outcome = SendOutcome::Sent;
        for member in members {
            if *member == messenger.profile().username {
                let message = "you are named among those to be removed";
                return Err(CliError::new(Exit::Failure, "client.yourself", message)
                    .hint("run `qpq group leave GROUP`"));
            }
            let person = messenger.resolve(member).await?;
            outcome = messenger.remove(id, person.identity).await?;
        }
        Ok(outcome)
    })
    .await
}

async fn ban(
    context: &Context,
    group: &str,
    member: &Username,
    reason: &str,
    duration: Option<BanDuration>,
) -> Result<(), CliError> {
    change(context, group, "member_banned", std::slice::from_ref(member), async |messenger, id| {
        let person = messenger.resolve(member).await?;
        let removed = match messenger.remove(id, person.identity).await {
            // A user may be banned before anyone adds it, and a repeat finds no member.
            Err(Error::Mls(MlsError::NotAMember(_))) => SendOutcome::Sent,
            outcome => outcome?,
        };
        let seconds = duration.map(|BanDuration(seconds)| seconds);
        messenger.ban_from_group(id, person.identity, reason, seconds).await?;
        Ok(removed)
    })
    .await
}

async fn unban(context: &Context, group: &str, member: &Username) -> Result<(), CliError> {
    change(
        context,
        group,
        "member_unbanned",
        std::slice::from_ref(member),
        async |messenger, id| {
            let person = messenger.resolve(member).await?;
            messenger.unban_from_group(id, person.identity).await?;
            Ok(SendOutcome::Sent)
        },
    )
    .await
}

#[derive(Debug, Serialize)]
struct Banned<'a> {
    #[serde(flatten)]
    person: PersonObject<'a>,
    reason: &'a str,
    banned_at: u64,
    /// `null` for a permanent ban.
    expires_at: Option<u64>,
    #[serde(skip)]
    shown: String,
}

impl Report for Banned<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let name = style.bold(&self.shown);
        let end = self.expires_at.map(UnixMillis);
        writeln!(out, "{name}  {}", moderate::ban_line(self.reason, end))
    }
}

async fn bans(context: &Context, group: &str) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let (id, _) = find(&messenger.conversations().await?, group)?;
        let bans = messenger.group_bans(id).await?;
        for ban in &bans {
            context.output.report(&Banned {
                person: (&ban.person).into(),
                reason: &ban.reason,
                banned_at: ban.banned_at.0,
                expires_at: ban.expires_at.map(|at| at.0),
                shown: entry::name(&ban.person),
            })?;
        }
        if bans.is_empty() {
            context.output.note("Nobody is banned from this group.");
        }
        Ok(())
    })
    .await
}

async fn rename(context: &Context, group: &str, name: &str) -> Result<(), CliError> {
    change(context, group, "group_renamed", &[], async |messenger, id| {
        Ok(messenger.rename(id, name).await?)
    })
    .await
}

async fn set_role(
    context: &Context,
    group: &str,
    member: &Username,
    role: Role,
) -> Result<(), CliError> {
    let event = match role {
        Role::Admin => "member_promoted",
        Role::Member => "member_demoted",
    };
    change(context, group, event, std::slice::from_ref(member), async |messenger, id| {
        let person = messenger.resolve(member).await?;
        Ok(messenger.set_role(id, person.identity, role).await?)
    })
    .await
}

async fn rejoin(context: &Context, group: &str) -> Result<(), CliError> {
    change(context, group, "group_rejoined", &[], async |messenger, id| {
        Ok(messenger.rejoin(id).await?)
    })
    .await
}

async fn rotate(context: &Context, group: &str, reason: &str) -> Result<(), CliError> {
    change(context, group, "rotation_requested", &[], async |messenger, id| {
        messenger.rotate_keys(id, reason).await?;
        Ok(SendOutcome::Sent)
    })
    .await
}

async fn leave(context: &Context, group: &str) -> Result<(), CliError> {
    change(context, group, "group_left", &[], async |messenger, id| {
        // If the server does not accept the `leaving` message now, the next command sends it.
        messenger.leave(id).await?;
        Ok(SendOutcome::Sent)
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
            Err(Error::AlreadyMember(_)) => {
                let message = format!("{member} is in the group {} already", text::line(name));
                return Err(CliError::new(Exit::Failure, "client.already_member", message)
                    .hint("`qpq group show GROUP` shows who is in it"));
            }
            Err(error) => return Err(error.into()),
        };
        match added {
            SendOutcome::Sent => {}
            SendOutcome::Queued(why) => return Err(message::queued(why.map(CliError::from))),
            SendOutcome::Refused => {
                let message = format!("the server does not accept messages for {member}");
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

async fn send(context: &Context, group: &str, given: Option<String>) -> Result<(), CliError> {
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
    /// The JSON key has been `maker` since the first release.
    #[serde(rename = "maker")]
    creator: String,
    members: usize,
    unseen: usize,
    /// Whether this account is a member.
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
        let membership = if self.member { "" } else { ", you are no longer in it" };
        writeln!(
            out,
            "{name}  {}, created by {creator}{news}{membership}  {}",
            text::count(*members, "member"),
            style.dim(format_args!("{id:.8}"))
        )
    }
}

async fn list(context: &Context) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let mut found = false;
        for Conversation { id, kind, unseen, .. } in messenger.conversations().await? {
            let ConversationKind::Group { name, creator, members, membership, .. } = kind else {
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
    admin: bool,
    /// The names of the member's devices.
    devices: &'a [String],
    #[serde(skip)]
    shown: String,
}

impl<'a> Member<'a> {
    fn new(member: &'a GroupMember, creator: &qpq_client::Person) -> Self {
        Self {
            person: (&member.person).into(),
            creator: creator.identity == member.person.identity,
            admin: member.role == Role::Admin,
            devices: &member.devices,
            shown: entry::name(&member.person),
        }
    }
}

impl Report for Member<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let role = match (self.creator, self.admin) {
            (true, true) => "  admin, created the group",
            (true, false) => "  created the group",
            (false, true) => "  admin",
            (false, false) => "",
        };
        writeln!(out, "{}{}", self.shown, style.dim(role))
    }
}

/// A group with its members and their devices.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    name: &'a str,
    id: String,
    member: bool,
    members: Vec<Member<'a>>,
}

impl Report for Shown<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let left = if self.member { "" } else { ", you are no longer in it" };
        let name = style.bold(text::line(self.name));
        let members = text::count(self.members.len(), "member");
        writeln!(out, "{name}, {members}{left}, id {}", self.id)?;
        for member in &self.members {
            member.human(out, style)?;
            for device in member.devices.iter().filter(|device| !device.is_empty()) {
                writeln!(out, "  {}", text::line(device))?;
            }
        }
        Ok(())
    }
}

async fn show(context: &Context, group: &str) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let conversations = messenger.conversations().await?;
        let (id, name) = find(&conversations, group)?;
        let Some(ConversationKind::Group { creator, membership, .. }) =
            conversations.iter().find(|one| one.id == id).map(|one| &one.kind)
        else {
            return Err(Error::NoSuchConversation.into());
        };
        let members = messenger.group_members(id).await?;
        context.output.report(&Shown {
            name: &name,
            id: id.to_string(),
            member: *membership == Membership::Member,
            members: members.iter().map(|member| Member::new(member, creator)).collect(),
        })
    })
    .await
}

async fn members(context: &Context, group: &str) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let conversations = messenger.conversations().await?;
        let (id, _) = find(&conversations, group)?;
        let Some(ConversationKind::Group { creator, .. }) =
            conversations.iter().find(|one| one.id == id).map(|one| &one.kind)
        else {
            return Err(Error::NoSuchConversation.into());
        };
        for member in messenger.group_members(id).await? {
            context.output.report(&Member::new(&member, creator))?;
        }
        Ok(())
    })
    .await
}
