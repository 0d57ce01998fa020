//! `qpq account export`: everything that this device has, as lines of JSON in a file.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, ErrorKind, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use qpq_client::{Conversation, ConversationKind, Membership, Messenger, Person, fingerprint};
use serde::Serialize;
use serde_json::json;

use super::opened;
use crate::{
    compose::Context,
    entry::{EntryReport, GroupNames, PersonObject, Place},
    error::{CliError, Exit},
    output::{Report, Style},
};

/// The version of the export's format.
const VERSION: u32 = 1;

#[derive(Debug, Serialize)]
struct Exported {
    event: &'static str,
    file: String,
    people: usize,
    conversations: usize,
    entries: usize,
    /// Whether the server could be asked for the list of devices.
    devices: bool,
}

impl Report for Exported {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { file, people, conversations, entries, .. } = self;
        writeln!(
            out,
            "{} has {entries} entries of {conversations} conversations, and {people} people.",
            style.bold(file)
        )?;
        if !self.devices {
            writeln!(out, "The server could not be reached, so your devices are not listed.")?;
        }
        writeln!(out, "The file is not encrypted.")
    }
}

/// Exports everything to `out`, or to a file named after the account.
pub(crate) async fn export(context: &Context, out: Option<PathBuf>) -> Result<(), CliError> {
    opened::locally(context, async |messenger, unreachable| {
        let name = format!("qpq-{}.jsonl", messenger.profile().username);
        let path = out.unwrap_or_else(|| name.into());
        let mut lines = Lines::create(&path)?;
        let mut exported = Exported {
            event: "exported",
            file: path.display().to_string(),
            people: 0,
            conversations: 0,
            entries: 0,
            devices: false,
        };
        if unreachable.is_none() {
            // Messages that wait in the inbox belong to the export.
            messenger.receive().await?;
        }
        account(messenger, &mut lines)?;
        if unreachable.is_none() {
            devices(messenger, &mut lines).await?;
            exported.devices = true;
        }
        exported.people = people(messenger, &mut lines).await?;
        for conversation in conversations(messenger, &mut lines).await? {
            exported.conversations += 1;
            exported.entries += conversation;
        }
        lines.finish()?;
        context.output.report(&exported)
    })
    .await
}

fn account(messenger: &Messenger, lines: &mut Lines<'_>) -> Result<(), CliError> {
    let profile = messenger.profile();
    lines.write(&json!({
        "event": "account",
        "version": VERSION,
        "username": profile.username.as_str(),
        "server": profile.server,
        "identity": profile.identity.to_string(),
        "fingerprint": fingerprint(&profile.identity),
    }))
}

async fn devices(messenger: &Messenger, lines: &mut Lines<'_>) -> Result<(), CliError> {
    for device in messenger.devices().await? {
        lines.write(&json!({
            "event": "device",
            "id": device.id.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            "name": device.name,
            "registered_at": device.registered_at.0,
            "last_seen_at": device.last_seen_at.0,
            "this": device.is_this,
        }))?;
    }
    Ok(())
}

/// A person, and what this device knows about the person's key.
#[derive(Debug, Serialize)]
struct PersonLine<'a> {
    event: &'static str,
    #[serde(flatten)]
    person: PersonObject<'a>,
    fingerprint: String,
    /// The time at which the safety number was compared, in Unix milliseconds.
    compared_at: Option<u64>,
    blocked: bool,
}

async fn people(messenger: &Messenger, lines: &mut Lines<'_>) -> Result<usize, CliError> {
    let blocked = messenger.blocked().await?;
    let mut all = messenger.people().await?;
    let is_known = |person: &Person| all.iter().any(|known| known.identity == person.identity);
    let unknown: Vec<_> = blocked.iter().filter(|person| !is_known(person)).cloned().collect();
    all.extend(unknown);
    for person in &all {
        let compared_at = messenger.compared_at(&person.identity).await?;
        lines.write(&PersonLine {
            event: "person",
            person: person.into(),
            fingerprint: fingerprint(&person.identity),
            compared_at: compared_at.map(|at| at.0),
            blocked: blocked.iter().any(|other| other.identity == person.identity),
        })?;
    }
    Ok(all.len())
}

/// A conversation and its members.
#[derive(Debug, Serialize)]
struct ConversationLine<'a> {
    event: &'static str,
    kind: &'static str,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    member: Option<bool>,
    members: Vec<PersonObject<'a>>,
}

/// Writes each conversation, followed by its entries. Returns the number of entries of each.
async fn conversations(
    messenger: &Messenger,
    lines: &mut Lines<'_>,
) -> Result<Vec<usize>, CliError> {
    let all = messenger.conversations().await?;
    let groups = GroupNames::of(&all);
    let mut counts = Vec::with_capacity(all.len());
    for conversation in &all {
        let Conversation { id, kind, .. } = conversation;
        let (name, member) = match kind {
            ConversationKind::Group { name, membership, .. } => {
                (Some(name.as_str()), Some(*membership == Membership::Member))
            }
            ConversationKind::Direct { .. } => (None, None),
        };
        let members = messenger.members(*id).await?;
        lines.write(&ConversationLine {
            event: "conversation",
            kind: if name.is_some() { "group" } else { "direct" },
            id: id.to_string(),
            name,
            member,
            members: members.iter().map(Into::into).collect(),
        })?;
        let entries = messenger.history(*id, usize::MAX).await?;
        for entry in &entries {
            let (place, now) = (Place::Anywhere, entry.at);
            lines.write(&EntryReport { entry, groups: &groups, place, now })?;
        }
        counts.push(entries.len());
    }
    Ok(counts)
}

/// A new file of JSON lines, which its owner alone can read.
struct Lines<'a> {
    path: &'a Path,
    file: BufWriter<File>,
}

impl<'a> Lines<'a> {
    fn create(path: &'a Path) -> Result<Self, CliError> {
        let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        match created {
            Ok(file) => Ok(Self { path, file: BufWriter::new(file) }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let message = format!("the file {} exists", path.display());
                Err(CliError::new(Exit::Failure, "client.file_exists", message)
                    .hint("name another one with --out FILE"))
            }
            Err(error) => Err(CliError::io(path.display(), &error)),
        }
    }

    fn write(&mut self, line: &impl Serialize) -> Result<(), CliError> {
        serde_json::to_writer(&mut self.file, line)
            .map_err(io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"))
            .map_err(|error| CliError::io(self.path.display(), &error))
    }

    /// Writes everything to the disk.
    fn finish(self) -> Result<(), CliError> {
        let Self { path, file } = self;
        let file = file.into_inner().map_err(|error| error.into_error());
        file.and_then(|file| file.sync_all()).map_err(|error| CliError::io(path.display(), &error))
    }
}
