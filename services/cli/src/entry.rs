//! The display of entries: a line for people, an object for programs (`object`).

mod object;

use std::{
    borrow::Cow,
    collections::HashMap,
    io::{self, Write},
    time::Duration,
};

use qpq_client::{
    Conversation, ConversationId, ConversationKind, DeliveryState, Entry, Event, Person,
    SharedFile, Standing, UnixMillis,
};

pub(crate) use self::object::PersonObject;
use crate::{
    output::{Report, Style},
    text,
};

/// The age from which an entry is shown with its age.
const FRESH: Duration = Duration::from_secs(60);

/// The groups' names, for entries that name them by id alone.
#[derive(Debug, Default)]
pub(crate) struct GroupNames(HashMap<ConversationId, String>);

impl GroupNames {
    pub(crate) fn of(conversations: &[Conversation]) -> Self {
        let named = conversations.iter().filter_map(|conversation| match &conversation.kind {
            ConversationKind::Group { name, .. } => Some((conversation.id, name.clone())),
            ConversationKind::Direct { .. } => None,
        });
        Self(named.collect())
    }

    pub(crate) fn knows(&self, conversation: Option<ConversationId>) -> bool {
        !matches!(conversation, Some(id @ ConversationId::Group(_)) if !self.0.contains_key(&id))
    }
}

/// The place where an entry is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Among the entries of all conversations. The entry names its conversation.
    Anywhere,
    /// Among the entries of the entry's conversation.
    Chat,
}

/// An entry, with all that is needed to show it.
#[derive(Debug)]
pub(crate) struct EntryReport<'a> {
    pub(crate) entry: &'a Entry,
    pub(crate) groups: &'a GroupNames,
    pub(crate) place: Place,
    pub(crate) now: UnixMillis,
}

impl Report for EntryReport<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        writeln!(out, "{}", self.line(style))
    }
}

impl EntryReport<'_> {
    /// Returns the entry for people; several lines if its text has several.
    pub(crate) fn line(&self, style: Style) -> String {
        let place = match (self.place, self.entry.conversation) {
            (Place::Anywhere, Some(id @ ConversationId::Group(_))) => {
                format!("[{}] ", self.group_name(id))
            }
            _ => String::new(),
        };
        let event = &self.entry.event;
        match event {
            Event::Sent { text, delivery, file } => {
                let mark = match delivery {
                    DeliveryState::Sent => "",
                    DeliveryState::Queued => " (not sent yet)",
                    DeliveryState::Failed => " (not delivered)",
                };
                self.said(&place, "you", &with_file(text, file.as_ref()), mark, style)
            }
            Event::Received { from, text, file, .. } => {
                self.said(&place, &name(from), &with_file(text, file.as_ref()), "", style)
            }
            Event::DeviceRequested { .. } | Event::NameRefuted { .. } | Event::NewKey { .. } => {
                style.bold(format_args!("* {}", self.of_account(event).unwrap_or_default()))
            }
            _ => match self.of_account(event) {
                Some(notice) => style.dim(format_args!("* {notice}")),
                None => style.dim(format_args!("* {place}{}", self.of_conversation(event))),
            },
        }
    }

    /// Describes an event that concerns the account; `None` for an event of a conversation.
    fn of_account(&self, event: &Event) -> Option<String> {
        Some(match event {
            Event::Joined { by } => {
                let group =
                    self.entry.conversation.map(|id| self.group_name(id)).unwrap_or_default();
                if by.standing == Standing::Own {
                    format!("you joined the group {group} on this device")
                } else {
                    format!("{} added you to the group {group}", name(by))
                }
            }
            Event::Requested { by, group } => {
                format!("{} {}: see `qpq requests`", name(by), wish(group.as_deref()))
            }
            Event::DeviceRequested { name } => format!(
                "a new device asks to be linked: {}. Run `qpq device approve` if it is yours",
                text::line(name)
            ),
            Event::Unreadable { from, reason } => {
                let from =
                    from.as_ref().map_or(String::new(), |from| format!(" from {}", name(from)));
                format!("a message{from} could not be read: {}", text::line(reason))
            }
            Event::WentBack => "the server's store went back in time, as when a backup is \
                                restored: what it accepted since then and did not deliver is lost"
                .to_owned(),
            Event::Restored => "this profile is an older copy of what it was: its keys were \
                                renewed before anything was sent"
                .to_owned(),
            Event::Missing { first, last } => {
                let many = last.0.saturating_sub(first.0).saturating_add(1);
                format!("{many} of the messages to you never came: expired, or read elsewhere")
            }
            Event::NameRefuted { person, claimed } => {
                let (claimed, person) = (text::line(claimed.as_str()), name(person));
                format!("Careful: a user who is not {claimed} claims that name; shown as {person}")
            }
            Event::NewKey { person } => format!(
                "Careful: {} has another key than the {1} you know. Ask {1} and compare \
                 `qpq keys {1}`",
                name(person),
                text::line(person.username.as_str())
            ),
            _ => return None,
        })
    }

    /// Describes an event of a conversation.
    fn of_conversation(&self, event: &Event) -> String {
        match event {
            Event::Added { members } => format!("{} joined", names(members)),
            Event::Removed { by, members } => self.removal(by.as_ref(), members),
            Event::DeviceAdded { person, device } => {
                format!("{} added a device: {}", self.owner(person), text::line(device))
            }
            Event::DeviceRemoved { person, device } => {
                format!("{} removed a device: {}", self.owner(person), text::line(device))
            }
            Event::Rejoined { person, device } => format!(
                "{} joined again on a device that had lost its keys: {}",
                self.owner(person),
                text::line(device)
            ),
            Event::Renamed { by, name } => {
                format!("{} named the group {}", self.owner(by), text::line(name))
            }
            Event::Promoted { members } => format!("now an admin: {}", names(members)),
            Event::Demoted { members } => format!("no longer an admin: {}", names(members)),
            Event::NotChanged { reason } => {
                format!("a change could not be made: {}", text::line(reason))
            }
            Event::Undeliverable { to, reason } => {
                format!("not delivered to {}: {}", name(to), text::line(reason))
            }
            // The other events are messages, or concern the account.
            _ => String::new(),
        }
    }

    /// Describes the removal or the leaving of members.
    fn removal(&self, by: Option<&Person>, members: &[Person]) -> String {
        let is_own = |person: &Person| person.standing == Standing::Own;
        let are_own = members.iter().any(is_own);
        match by {
            None if are_own => "you are no longer in the group".to_owned(),
            None => format!("{} left", names(members)),
            Some(by) if is_own(by) && are_own => "you left the group on another device".to_owned(),
            Some(by) => {
                let removed: Vec<_> = members.iter().map(|one| self.owner(one)).collect();
                let verb = if members.len() == 1 && !are_own { "was" } else { "were" };
                format!("{} {verb} removed by {}", removed.join(", "), self.owner(by))
            }
        }
    }

    /// Returns a person's name, or `you`.
    fn owner(&self, person: &Person) -> String {
        if person.standing == Standing::Own { "you".to_owned() } else { name(person) }
    }

    fn said(&self, place: &str, who: &str, text: &str, mark: &str, style: Style) -> String {
        let age = self.now.since(self.entry.at);
        let age = if age < FRESH {
            String::new()
        } else {
            style.dim(format_args!(" ({} ago)", span(age)))
        };
        format!("{place}{}{age}: {}{mark}", style.bold(who), text::message(text))
    }

    fn group_name(&self, id: ConversationId) -> String {
        self.groups
            .0
            .get(&id)
            .map_or_else(|| format!("{:.8}", id.to_string()), |name| text::line(name).to_string())
    }
}

/// Returns the description of a file, and the text below it.
fn with_file<'a>(text: &'a str, file: Option<&SharedFile>) -> Cow<'a, str> {
    match file {
        None => text.into(),
        Some(file) if text.is_empty() => describe(file).into(),
        Some(file) => format!("{}\n{text}", describe(file)).into(),
    }
}

/// Describes a file: its name, size and type, and the size of a picture.
pub(crate) fn describe(file: &SharedFile) -> String {
    let mut parts = vec![text::line(&file.name).to_string(), size(file.size)];
    if !file.mime.is_empty() {
        parts.push(text::line(&file.mime).to_string());
    }
    if let Some((width, height)) = file.picture {
        parts.push(format!("{width}×{height}"));
    }
    format!("[file: {}]", parts.join(", "))
}

/// Formats a number of bytes.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_024 => format!("{bytes} B"),
        1_024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1_024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// Describes the request of a stranger, as a phrase after the stranger's name.
pub(crate) fn wish(group: Option<&str>) -> String {
    match group {
        Some(name) => format!("wants to add you to the group {}", text::line(name)),
        None => "wants to write to you".to_owned(),
    }
}

/// Returns a person's name, with a mark if it is not verified.
pub(crate) fn name(person: &Person) -> String {
    text::line(&person.to_string()).to_string()
}

/// Returns several people's names.
pub(crate) fn names(people: &[Person]) -> String {
    people.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Formats a time span for people.
pub(crate) fn span(span: Duration) -> String {
    match span.as_secs() {
        secs @ 0..120 => format!("{secs} s"),
        secs @ 120..7_200 => format!("{} min", secs / 60),
        secs @ 7_200..172_800 => format!("{} h", secs / 3_600),
        secs => format!("{} days", secs / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qpq_client::{EntryId, IdentityKey, Seq, Username};

    const KEY: IdentityKey = IdentityKey::new([0xab; 32]);

    fn bob(standing: Standing) -> Person {
        Person { identity: KEY, username: Username::parse("bob").unwrap(), standing }
    }

    pub(super) fn entry(event: Event) -> Entry {
        Entry {
            id: EntryId(7),
            conversation: Some(ConversationId::Direct(KEY)),
            at: UnixMillis(1_000),
            event,
        }
    }

    fn line(event: Event, now: u64) -> String {
        let groups = GroupNames::default();
        let entry = entry(event);
        EntryReport { entry: &entry, groups: &groups, place: Place::Anywhere, now: UnixMillis(now) }
            .line(Style::Plain)
    }

    pub(super) fn received(text: &str) -> Event {
        Event::Received {
            from: bob(Standing::Confirmed),
            text: text.into(),
            sent_at: UnixMillis(900),
            file: None,
        }
    }

    #[test]
    fn a_message_is_a_line_with_its_age_when_it_is_old() {
        assert_eq!(line(received("hi"), 2_000), "bob: hi");
        assert_eq!(line(received("hi"), 181_000), "bob (3 min ago): hi");
        assert_eq!(line(received("hi"), 0), "bob: hi", "a clock that is behind");
        assert_eq!(line(received("a\nb\x1b"), 2_000), "bob: a\n  | b\\u{1b}");
        let delivery = DeliveryState::Queued;
        let queued = Event::Sent { text: "hi".into(), delivery, file: None };
        assert_eq!(line(queued, 2_000), "you: hi (not sent yet)");
        assert_eq!(
            line(Event::Missing { first: Seq(3), last: Seq(4) }, 0).split_whitespace().nth(1),
            Some("2")
        );
    }

    #[test]
    fn a_file_is_shown_with_its_name_size_type_and_picture() {
        let file = |name: &str, size, mime: &str, picture| {
            let (name, mime) = (name.into(), mime.into());
            SharedFile { name, size, mime, blob: [0; 32], key: [0; 32], picture }
        };
        let shown = |file| {
            let Event::Received { from, text, sent_at, .. } = received("") else { panic!() };
            line(Event::Received { from, text, sent_at, file: Some(file) }, 2_000)
        };
        assert_eq!(
            shown(file("photo.jpg", 1_258_291, "image/jpeg", Some((640, 480)))),
            "bob: [file: photo.jpg, 1.2 MiB, image/jpeg, 640×480]"
        );
        assert_eq!(shown(file("a\nb", 3, "", None)), "bob: [file: a\\u{a}b, 3 B]");
        assert_eq!(
            [0, 1_023, 1_024, 52_428_800].map(size),
            ["0 B", "1023 B", "1.0 KiB", "50.0 MiB"]
        );
    }

    #[test]
    fn members_that_left_are_distinguished_from_removed_ones() {
        let carol = Person {
            identity: IdentityKey::new([2; 32]),
            username: Username::parse("carol").unwrap(),
            standing: Standing::Confirmed,
        };
        let (me, bob) = (bob(Standing::Own), bob(Standing::Confirmed));
        let removed = |by: Option<&Person>, members: &[&Person]| {
            let members = members.iter().map(|one| (*one).clone()).collect();
            line(Event::Removed { by: by.cloned(), members }, 0)
        };
        assert_eq!(removed(None, &[&bob, &carol]), "* bob, carol left");
        assert_eq!(removed(Some(&carol), &[&bob]), "* bob was removed by carol");
        assert_eq!(removed(Some(&me), &[&bob, &carol]), "* bob, carol were removed by you");
        assert_eq!(removed(Some(&carol), &[&me]), "* you were removed by carol");
        assert_eq!(removed(Some(&me), &[&me]), "* you left the group on another device");
        assert_eq!(removed(None, &[&me]), "* you are no longer in the group");
    }

    #[test]
    fn a_false_name_is_never_shown_bare() {
        let from = bob(Standing::Refuted);
        let event =
            Event::Received { from, text: "pay me".into(), sent_at: UnixMillis(900), file: None };
        assert_eq!(line(event, 2_000), "bob!abababab: pay me");
    }

    #[test]
    fn durations_are_shown_in_one_unit() {
        let said = [0, 119, 120, 7_199, 7_200, 172_799, 172_800]
            .map(|secs| span(Duration::from_secs(secs)));
        assert_eq!(said, ["0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 days"]);
    }
}
