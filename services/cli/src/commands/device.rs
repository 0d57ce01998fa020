//! `qpq device`: links a new device, approves one, lists, renames and revokes them.

use std::{
    io::{self, IsTerminal as _, Write},
    time::Duration,
};

use qpq_client::{
    DeviceId, Error, LinkCode, LinkRequest, Messenger, OwnDevice, Profile, ProfileError, Trust,
    UnixMillis, Username,
};
use qpq_ports::{Clock as _, SystemClock};
use serde::Serialize;

use super::{account, opened};
use crate::{
    args::DeviceCommand,
    compose::Context,
    entry::span,
    error::{CliError, Exit},
    output::{Format, Report, Style},
    text,
};

/// Runs one command about devices.
pub(super) async fn run(context: &Context, command: DeviceCommand) -> Result<(), CliError> {
    match command {
        DeviceCommand::Link { username, name, timeout } => {
            link(context, &username, &name, Duration::from_secs(timeout)).await
        }
        DeviceCommand::Approve { code } => approve(context, code).await,
        DeviceCommand::List => list(context).await,
        DeviceCommand::Rename { name } => rename(context, &name).await,
        DeviceCommand::Revoke { device } => revoke(context, &device).await,
    }
}

/// The report of a new device that waits to be approved.
#[derive(Debug, Serialize)]
struct Asked<'a> {
    event: &'static str,
    username: &'a str,
    name: &'a str,
    code: String,
    #[serde(skip)]
    timeout: Duration,
}

impl Report for Asked<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { username, code, .. } = self;
        writeln!(out, "On a device that is logged in as {}, run:", style.bold(username))?;
        writeln!(out, "  qpq device approve {}", style.bold(code))?;
        writeln!(out, "Approve no other code. This device waits for {}.", span(self.timeout))
    }
}

async fn link(
    context: &Context,
    username: &Username,
    name: &str,
    timeout: Duration,
) -> Result<(), CliError> {
    let dir = context.dir();
    match Profile::read(&dir) {
        Err(ProfileError::Missing(_)) => {}
        Ok(_) => {
            let message = format!("the profile {} has an account already", context.profile);
            return Err(CliError::new(Exit::Failure, "profile.exists", message)
                .hint("link in another profile: qpq -p NAME device link …"));
        }
        Err(error) => return Err(Error::from(error).into()),
    }
    let mut options = context.fresh_options()?;
    let seen = account::check_server(context, &options).await?;
    let is_pinned_now = options.trust == Trust::FirstUse;
    options.trust = options.trust.settled(seen);
    let password = context.password.known().await?;
    let asking = Box::pin(Messenger::link(&dir, options, username, &password, name));
    let linking = context.progress.during("logging in", asking).await?;
    context.output.report(&Asked {
        event: "link_requested",
        username: username.as_str(),
        name,
        code: linking.code().to_string(),
        timeout,
    })?;
    let finishing = Box::pin(linking.finish(timeout));
    let messenger = context.progress.during("waiting to be approved", finishing).await?;
    let reported = account::report(context, "linked", &messenger, is_pinned_now).await;
    opened::close(messenger).await;
    reported
}

/// A device that asks to be linked.
#[derive(Debug, Serialize)]
struct Waiting<'a> {
    event: &'static str,
    name: &'a str,
    code: String,
    /// Unix milliseconds, by the server's clock.
    at: u64,
    #[serde(skip)]
    age: Duration,
}

impl<'a> Waiting<'a> {
    fn of(request: &'a LinkRequest, now: UnixMillis) -> Self {
        Self {
            event: "link_request",
            name: &request.name,
            code: request.code.to_string(),
            at: request.at.0,
            age: now.since(request.at),
        }
    }
}

impl Report for Waiting<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let (name, age) = (text::line(self.name), span(self.age));
        writeln!(
            out,
            "{}  {name}  {}",
            style.bold(&self.code),
            style.dim(format_args!("{age} ago"))
        )
    }
}

#[derive(Debug, Serialize)]
struct Changed {
    event: &'static str,
    id: String,
    name: String,
}

impl Report for Changed {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let name = style.bold(text::line(&self.name));
        match self.event {
            "device_approved" => {
                writeln!(out, "{name} is now a device of yours.")
            }
            "device_renamed" => writeln!(out, "This device is now named {name}."),
            _ => {
                writeln!(out, "{name} is revoked: its sessions have ended.")?;
                writeln!(
                    out,
                    "It keeps the messages that it has received. New messages do not reach it."
                )
            }
        }
    }
}

async fn approve(context: &Context, code: Option<LinkCode>) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let listing = Box::pin(messenger.link_requests());
        let waiting = context.progress.during("computing codes", listing).await?;
        let request = match code {
            Some(code) => waiting.iter().find(|request| request.code == code),
            None => match ask(context, &waiting).await? {
                Some(request) => Some(request),
                None => return Ok(()),
            },
        };
        let request = request.ok_or(Error::NoSuchLinkRequest)?;
        // The password is also asked for if the profile is unlocked: a person that finds the
        // machine must not be able to link a device.
        let password = context.password.known().await?;
        let approving = Box::pin(messenger.approve_link(request, &password));
        context.progress.during("linking", approving).await?;
        context.output.report(&Changed {
            event: "device_approved",
            id: hex(request.device()),
            name: request.name.clone(),
        })
    })
    .await
}

/// Lists the requests that wait. Returns the request that the person approves.
///
/// Asks about a single request at a terminal.
async fn ask<'a>(
    context: &Context,
    waiting: &'a [LinkRequest],
) -> Result<Option<&'a LinkRequest>, CliError> {
    let now = SystemClock.now();
    for request in waiting {
        context.output.report(&Waiting::of(request, now))?;
    }
    let is_terminal = io::stdin().is_terminal() && context.output.format == Format::Human;
    match waiting {
        [] => {
            context.output.note(
                "No device asks to be linked. Run on the new one: qpq device link --name NAME USER",
            );
            Ok(None)
        }
        [only] if is_terminal => {
            let question = format!("Does the new device show {}? [y/N] ", only.code);
            Ok(confirms(question).await?.then_some(only))
        }
        _ => {
            context
                .output
                .note("Approve the one whose code its device shows: qpq device approve CODE");
            Ok(None)
        }
    }
}

/// Asks a question that is answered with yes or no.
async fn confirms(question: String) -> Result<bool, CliError> {
    let answered = tokio::task::spawn_blocking(move || {
        let mut terminal = io::stderr();
        terminal.write_all(question.as_bytes())?;
        terminal.flush()?;
        let mut line = String::new();
        io::stdin().read_line(&mut line)?;
        Ok(line)
    })
    .await
    .expect("reading a line does not panic");
    let line = answered.map_err(|error: io::Error| CliError::io("standard input", &error))?;
    Ok(matches!(line.trim().to_lowercase().as_str(), "y" | "yes"))
}

#[derive(Debug, Serialize)]
struct Listed {
    id: String,
    name: String,
    /// Unix milliseconds, by the server's clock.
    registered_at: u64,
    last_seen_at: u64,
    /// Whether this is the device in use.
    current: bool,
    #[serde(skip)]
    unused: Duration,
}

impl Report for Listed {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let name = style.bold(text::line(&self.name));
        let used = match self.current {
            true => "this device".to_owned(),
            false => format!("used {} ago", span(self.unused)),
        };
        writeln!(out, "{name}  {used}  {}", style.dim(format_args!("{:.8}", self.id)))
    }
}

async fn list(context: &Context) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let now = SystemClock.now();
        for device in messenger.devices().await? {
            context.output.report(&Listed {
                id: hex(device.id),
                name: device.name,
                registered_at: device.registered_at.0,
                last_seen_at: device.last_seen_at.0,
                current: device.is_this,
                unused: now.since(device.last_seen_at),
            })?;
        }
        Ok(())
    })
    .await
}

async fn rename(context: &Context, name: &str) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let id = messenger.device_id().await?.ok_or(Error::NoDevice)?;
        messenger.rename_device(name).await?;
        let (event, name) = ("device_renamed", name.to_owned());
        context.output.report(&Changed { event, id: hex(id), name })
    })
    .await
}

async fn revoke(context: &Context, named: &str) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let devices = messenger.devices().await?;
        let OwnDevice { id, name, .. } = find(&devices, named)?;
        messenger.revoke_device(*id).await?;
        let (event, name) = ("device_revoked", name.clone());
        context.output.report(&Changed { event, id: hex(*id), name })
    })
    .await
}

/// Returns the device of a name, or of an id that begins with the text.
fn find<'a>(devices: &'a [OwnDevice], named: &str) -> Result<&'a OwnDevice, CliError> {
    let by_name: Vec<_> = devices.iter().filter(|device| device.name == named).collect();
    let by_id = devices.iter().filter(|device| {
        named.len() >= MIN_ID && hex(device.id).starts_with(&named.to_ascii_lowercase())
    });
    let found = if by_name.is_empty() { by_id.collect() } else { by_name };
    match found[..] {
        [one] => Ok(one),
        [] => Err(Error::NoSuchDevice.into()),
        _ => {
            let message = format!("several devices are named {}", text::line(named));
            Err(CliError::new(Exit::Failure, "client.ambiguous_device", message)
                .hint("name one by the id that `qpq device list` shows"))
        }
    }
}

/// The minimum number of digits of an id.
const MIN_ID: usize = 4;

fn hex(id: DeviceId) -> String {
    hex::encode(id.as_bytes())
}
