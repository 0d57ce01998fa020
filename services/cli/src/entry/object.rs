//! The objects of entries, for programs.

use qpq_client::{ConversationId, DeliveryState, Event, Person, SharedFile, Standing};
use serde::Serialize;

use super::EntryReport;

/// The object of an entry. Keys that do not apply are left out.
#[derive(Debug, Default, Serialize)]
#[serde(default)]
struct Object<'a> {
    event: &'static str,
    id: u64,
    /// Unix milliseconds, by the server's clock.
    at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    conversation: Option<ConversationObject<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<PersonObject<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    /// Unix milliseconds, by the sender's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delivery: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<FileObject<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    people: Vec<PersonObject<'a>>,
    /// The name of a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    /// The name of the group of a request, or the new name of a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<u64>,
}

/// A file in the JSON output of the commands. Its key is left out.
#[derive(Debug, Serialize)]
struct FileObject<'a> {
    name: &'a str,
    size: u64,
    mime: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    width: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    height: Option<u32>,
}

impl<'a> From<&'a SharedFile> for FileObject<'a> {
    fn from(file: &'a SharedFile) -> Self {
        let (width, height) = file.picture.unzip();
        Self { name: &file.name, size: file.size, mime: &file.mime, width, height }
    }
}

#[derive(Debug, Serialize)]
struct ConversationObject<'a> {
    kind: &'static str,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
}

/// A person in the JSON output of the commands.
#[derive(Debug, Serialize)]
pub(crate) struct PersonObject<'a> {
    username: &'a str,
    identity: String,
    /// The verification of the name: `own`, `confirmed`, `claimed`, `refuted` or `new_key`.
    standing: &'static str,
}

impl<'a> From<&'a Person> for PersonObject<'a> {
    fn from(person: &'a Person) -> Self {
        let standing = match person.standing {
            Standing::Own => "own",
            Standing::Claimed => "claimed",
            Standing::Confirmed => "confirmed",
            Standing::Refuted => "refuted",
            Standing::NewKey => "new_key",
        };
        Self { username: person.username.as_str(), identity: person.identity.to_string(), standing }
    }
}

impl Serialize for EntryReport<'_> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut object = Object {
            id: self.entry.id.0,
            at: self.entry.at.0,
            conversation: self.entry.conversation.map(|id| self.conversation(id)),
            ..Object::default()
        };
        object.describe(&self.entry.event);
        object.serialize(to)
    }
}

impl EntryReport<'_> {
    fn conversation(&self, id: ConversationId) -> ConversationObject<'_> {
        let (kind, name) = match id {
            ConversationId::Direct(_) => ("direct", None),
            ConversationId::Group(_) => ("group", self.groups.0.get(&id).map(String::as_str)),
        };
        ConversationObject { kind, id: id.to_string(), name }
    }
}

impl<'a> Object<'a> {
    /// Sets the name of an event and the keys that belong to it.
    fn describe(&mut self, event: &'a Event) {
        match event {
            Event::Sent { text, delivery, file } => {
                (self.event, self.text) = ("sent", Some(text.as_str()));
                self.file = file.as_ref().map(Into::into);
                self.delivery = Some(delivery_name(*delivery));
            }
            Event::Received { from, text, sent_at, file } => {
                self.by("message", from);
                self.file = file.as_ref().map(Into::into);
                (self.text, self.sent_at) = (Some(text.as_str()), Some(sent_at.0));
            }
            Event::Joined { by } => self.by("joined", by),
            Event::Requested { by, group } => {
                self.by("request", by);
                self.group = group.as_deref();
            }
            Event::Renamed { by, name } => {
                self.by("renamed", by);
                self.group = Some(name);
            }
            Event::Added { members } => self.about("added", members),
            Event::Removed { by, members } => {
                self.about("removed", members);
                self.from = by.as_ref().map(Into::into);
            }
            Event::Promoted { members } => self.about("promoted", members),
            Event::Demoted { members } => self.about("demoted", members),
            Event::NameRefuted { person, claimed } => {
                self.about("name_refuted", [person]);
                self.text = Some(claimed.as_str());
            }
            Event::NewKey { person } => self.about("new_key", [person]),
            Event::DeviceRequested { name } => {
                (self.event, self.device) = ("device_request", Some(name.as_str()));
            }
            Event::DeviceAdded { person, device } => self.device("device_added", person, device),
            Event::DeviceRemoved { person, device } => {
                self.device("device_removed", person, device);
            }
            Event::Rejoined { person, device } => self.device("rejoined", person, device),
            Event::Unreadable { from, reason } => {
                (self.event, self.reason) = ("unreadable", Some(reason.as_str()));
                self.from = from.as_ref().map(Into::into);
            }
            Event::NotChanged { reason } => {
                (self.event, self.reason) = ("not_changed", Some(reason.as_str()));
            }
            Event::Undeliverable { to, reason } => {
                self.about("undeliverable", [to]);
                self.reason = Some(reason);
            }
            Event::Missing { first, last } => {
                self.event = "missing";
                (self.first, self.last) = (Some(first.0), Some(last.0));
            }
            Event::WentBack => self.event = "server_went_back",
            Event::Restored => self.event = "profile_went_back",
        }
    }

    fn by(&mut self, event: &'static str, from: &'a Person) {
        (self.event, self.from) = (event, Some(from.into()));
    }

    fn about(&mut self, event: &'static str, people: impl IntoIterator<Item = &'a Person>) {
        (self.event, self.people) = (event, people.into_iter().map(Into::into).collect());
    }

    fn device(&mut self, event: &'static str, owner: &'a Person, device: &'a str) {
        self.about(event, [owner]);
        self.device = Some(device);
    }
}

/// Returns the name of a delivery state in JSON.
fn delivery_name(delivery: DeliveryState) -> &'static str {
    match delivery {
        DeliveryState::Queued => "queued",
        DeliveryState::Sent => "sent",
        DeliveryState::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use qpq_client::UnixMillis;
    use serde_json::json;

    use super::{
        super::{
            GroupNames, Place,
            tests::{entry, received},
        },
        *,
    };

    #[test]
    fn the_object_has_the_documented_keys() {
        let (entry, groups) = (entry(received("hi")), GroupNames::default());
        let shown = EntryReport {
            entry: &entry,
            groups: &groups,
            place: Place::Anywhere,
            now: UnixMillis(0),
        };
        let key = "ab".repeat(32);
        assert_eq!(
            serde_json::to_value(&shown).unwrap(),
            json!({
                "event": "message", "id": 7, "at": 1000, "sent_at": 900, "text": "hi",
                "conversation": { "kind": "direct", "id": key },
                "from": { "username": "bob", "identity": key, "standing": "confirmed" },
            })
        );
    }
}
