//! `qpq requests`, `qpq accept`, `qpq decline`: groups and direct conversations of strangers.

use std::io::{self, Write};

use qpq_client::{ContactRequest, Messenger, Requests, UnixMillis, Username};
use qpq_ports::{Clock as _, SystemClock};
use serde::Serialize;

use super::{find::MIN_ID_DIGITS, opened};
use crate::{
    args::Recipient,
    compose::Context,
    entry::{self, PersonObject},
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

/// The decision about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    Accept,
    Decline,
}

#[derive(Debug, Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    object: Object<'a>,
    members: usize,
    at: u64,
    #[serde(skip)]
    shown: String,
}

#[derive(Debug, Serialize)]
struct Decided<'a> {
    event: &'static str,
    #[serde(flatten)]
    object: Object<'a>,
    #[serde(skip)]
    shown: String,
}

#[derive(Debug, Serialize)]
struct Dropped {
    event: &'static str,
    count: u64,
    #[serde(skip)]
    shown: String,
}

/// A request, as in the JSON of every command.
#[derive(Debug, Serialize)]
struct Object<'a> {
    id: String,
    kind: &'static str,
    /// The group's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    from: PersonObject<'a>,
}

impl<'a> From<&'a ContactRequest> for Object<'a> {
    fn from(request: &'a ContactRequest) -> Self {
        Self {
            id: request.id.to_string(),
            kind: if request.group.is_some() { "group" } else { "direct" },
            name: request.group.as_deref(),
            from: (&request.from).into(),
        }
    }
}

impl Report for Listed<'_> {
    fn human(&self, out: &mut dyn Write, _: Style) -> io::Result<()> {
        writeln!(out, "{}", self.shown)
    }
}

impl Report for Decided<'_> {
    fn human(&self, out: &mut dyn Write, _: Style) -> io::Result<()> {
        writeln!(out, "{}", self.shown)
    }
}

impl Report for Dropped {
    fn human(&self, out: &mut dyn Write, _: Style) -> io::Result<()> {
        writeln!(out, "{}", self.shown)
    }
}

pub(crate) async fn list(context: &Context) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let requests = messenger.requests().await?;
        let now = SystemClock.now();
        for request in &requests.waiting {
            context.output.report(&Listed {
                object: request.into(),
                members: request.members,
                at: request.at.0,
                shown: line(request, now, context.output.style),
            })?;
        }
        if requests.waiting.is_empty() {
            context.output.note("No requests.");
        }
        if let Some(shown) = dropped(&requests) {
            let event = "requests_dropped";
            context.output.report(&Dropped { event, count: requests.dropped, shown })?;
        }
        Ok(())
    })
    .await
}

pub(crate) async fn decide(
    context: &Context,
    which: &Recipient,
    decision: Decision,
) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let requests = messenger.requests().await?;
        for request in find(&requests.waiting, which)? {
            apply(messenger, request, decision).await?;
            context.output.report(&Decided {
                event: match decision {
                    Decision::Accept => "accepted",
                    Decision::Decline => "declined",
                },
                object: request.into(),
                shown: decided(request, decision, context.output.style),
            })?;
        }
        Ok(())
    })
    .await
}

/// Lists the requests as lines for a person.
pub(crate) async fn lines(messenger: &Messenger, style: Style) -> Result<Vec<String>, CliError> {
    let requests = messenger.requests().await?;
    let now = SystemClock.now();
    let mut lines: Vec<_> =
        requests.waiting.iter().map(|request| line(request, now, style)).collect();
    if lines.is_empty() {
        lines.push(style.dim("* no requests"));
    }
    lines.extend(dropped(&requests));
    Ok(lines)
}

/// Decides on the requests that a line names, and returns the result as lines for a person.
pub(crate) async fn decide_lines(
    messenger: &Messenger,
    which: &str,
    decision: Decision,
    style: Style,
) -> Result<Vec<String>, CliError> {
    let which: Recipient = which.parse().map_err(CliError::usage)?;
    let requests = messenger.requests().await?;
    let mut lines = Vec::new();
    for request in find(&requests.waiting, &which)? {
        apply(messenger, request, decision).await?;
        lines.push(decided(request, decision, style));
    }
    Ok(lines)
}

async fn apply(
    messenger: &Messenger,
    request: &ContactRequest,
    decision: Decision,
) -> Result<(), CliError> {
    match decision {
        Decision::Accept => messenger.accept(request.id).await.map(drop)?,
        Decision::Decline => messenger.decline(request.id).await?,
    }
    Ok(())
}

fn line(request: &ContactRequest, now: UnixMillis, style: Style) -> String {
    let name = style.bold(entry::name(&request.from));
    let wish = entry::wish(request.group.as_deref());
    let members = match request.group {
        Some(_) => format!(", {} members", request.members),
        None => String::new(),
    };
    let age = entry::span(now.since(request.at));
    let id = style.dim(format_args!("{:.8}", request.id.to_string()));
    format!("{name} {wish}{members}, {age} ago  {id}")
}

fn decided(request: &ContactRequest, decision: Decision, style: Style) -> String {
    let name = entry::name(&request.from);
    match (decision, request.group.as_deref()) {
        (Decision::Accept, Some(group)) => {
            let group = style.bold(text::line(group));
            format!("You joined the group {group}, created by {name}.")
        }
        (Decision::Accept, None) => format!("Messages of {name} are accepted."),
        (Decision::Decline, Some(group)) => {
            format!("Declined the group {} of {name}.", style.bold(text::line(group)))
        }
        (Decision::Decline, None) => format!("Declined the messages of {name}."),
    }
}

fn dropped(requests: &Requests) -> Option<String> {
    (requests.dropped > 0).then(|| {
        format!("{} more requests were dropped, because too many waited.", requests.dropped)
    })
}

/// Returns the named requests: all of a user, or that for one group. A name that fits both, or that
/// several users claim, is refused.
fn find<'a>(
    waiting: &'a [ContactRequest],
    which: &Recipient,
) -> Result<Vec<&'a ContactRequest>, CliError> {
    let of_user = |user: &Username| -> Vec<_> {
        waiting.iter().filter(|request| request.from.username == *user).collect()
    };
    let (name_or_id, by_user, by_group) = match which {
        Recipient::User(user) => (user.to_string(), of_user(user), Vec::new()),
        Recipient::Either(name_or_id) => {
            let users = Username::parse(name_or_id).map(|user| of_user(&user)).unwrap_or_default();
            let groups = waiting.iter().filter(|request| is_group(request, name_or_id)).collect();
            (name_or_id.clone(), users, groups)
        }
    };
    let is_one_user = by_user.windows(2).all(|two| two[0].from.identity == two[1].from.identity);
    match (by_user.len(), by_group.len()) {
        (0, 0) => Err(CliError::new(
            Exit::Failure,
            "client.no_such_request",
            format_args!(
                "no request from {0}, and none for a group called {0}",
                text::line(&name_or_id)
            ),
        )
        .hint("see `qpq requests`")),
        (0, 1) => Ok(by_group),
        (_, 0) if is_one_user => Ok(by_user),
        _ => Err(CliError::new(
            Exit::Failure,
            "client.ambiguous_request",
            format_args!("several users or groups are called {}", text::line(&name_or_id)),
        )
        .hint("give the id that `qpq requests` shows")),
    }
}

fn is_group(request: &ContactRequest, name_or_id: &str) -> bool {
    let is_id =
        name_or_id.len() >= MIN_ID_DIGITS && name_or_id.bytes().all(|b| b.is_ascii_hexdigit());
    request.group.as_deref() == Some(name_or_id)
        || is_id && request.id.to_string().starts_with(&name_or_id.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use qpq_client::{GroupId, IdentityKey, Person, Standing};

    use super::*;

    fn request(id: u8, key: u8, user: &str, group: Option<&str>) -> ContactRequest {
        ContactRequest {
            id: GroupId::try_from(&[id; 32][..]).unwrap(),
            from: Person {
                identity: IdentityKey::new([key; 32]),
                username: Username::parse(user).unwrap(),
                standing: Standing::Claimed,
            },
            group: group.map(str::to_owned),
            members: 2,
            at: UnixMillis(0),
        }
    }

    #[test]
    fn a_request_is_found_by_user_group_or_id_and_never_guessed() {
        let waiting = [
            request(0xaa, 1, "dave", Some("offer")),
            request(0xbb, 1, "dave", None),
            request(0xcc, 2, "eve", Some("offer")),
            request(0xdd, 3, "eve", Some("dave")),
            request(0xee, 4, "frank", Some("party")),
        ];
        let ids = |name_or_id: &str| {
            let found = find(&waiting, &name_or_id.parse().unwrap())?;
            Ok::<_, CliError>(
                found.iter().map(|request| request.id.as_bytes()[0]).collect::<Vec<_>>(),
            )
        };
        assert_eq!(ids("@dave").unwrap(), [0xaa, 0xbb]);
        assert_eq!(ids("frank").unwrap(), [0xee]);
        assert_eq!(ids("party").unwrap(), [0xee]);
        assert_eq!(ids("BBBBBBB").unwrap(), [0xbb]);
        for ambiguous in ["dave", "offer", "@eve"] {
            assert_eq!(ids(ambiguous).unwrap_err().code, "client.ambiguous_request", "{ambiguous}");
        }
        for nobody in ["nobody", "bb", "@party"] {
            assert_eq!(ids(nobody).unwrap_err().code, "client.no_such_request", "{nobody}");
        }
    }
}
