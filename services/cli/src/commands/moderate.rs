//! `qpq moderate`: bans of the server and reports, for administrators.

use std::io::{self, Write};

use qpq_client::{CallError, Error, IdentityKey, Messenger, UnixMillis, methods, v1};
use serde::Serialize;

use super::opened;
use crate::{
    args::{BanDuration, ModerateCommand, PersonArg},
    compose::Context,
    error::CliError,
    output::{Report, Style},
    text,
};

/// Runs one command of an administrator.
pub(super) async fn run(context: &Context, command: ModerateCommand) -> Result<(), CliError> {
    match command {
        ModerateCommand::Ban { person, reason, duration } => {
            ban(context, &person, &reason, duration).await
        }
        ModerateCommand::Unban { person } => unban(context, &person).await,
        ModerateCommand::Bans => bans(context).await,
        ModerateCommand::Reports { limit, skip } => reports(context, limit, skip).await,
    }
}

/// An account, as the server names it.
#[derive(Debug, Clone, Serialize)]
struct Account {
    /// Empty if the server has no account with the identity.
    username: String,
    identity: String,
}

impl Account {
    /// Returns the name for people; the identity if there is no name.
    fn shown(&self) -> String {
        if self.username.is_empty() { self.identity.clone() } else { self.username.clone() }
    }

    /// Returns the account of a key, with the name from the server's directory.
    async fn of(messenger: &Messenger, key: &[u8]) -> Result<Self, CliError> {
        let request =
            v1::ResolveIdentityRequest { identity_key: key.to_vec().into(), ..Default::default() };
        let username = match messenger.client().call::<methods::ResolveIdentity>(request).await {
            Ok(answer) => answer.username,
            Err(error) if error.is_code("users.not_found") => String::new(),
            Err(error) => return Err(error.into()),
        };
        Ok(Self { username, identity: hex::encode(key) })
    }
}

/// Returns the key of the named account.
async fn key_of(messenger: &Messenger, person: &PersonArg) -> Result<IdentityKey, CliError> {
    let user = match (&person.key, &person.user) {
        (Some(key), _) => return Ok(*key),
        (None, Some(user)) => user,
        (None, None) => unreachable!("one of them is required"),
    };
    // The key of the directory, whichever key this profile knows: the server bans its own account
    // of that name.
    let request =
        v1::ResolveUserRequest { username: user.as_str().to_owned(), ..Default::default() };
    match messenger.client().call::<methods::ResolveUser>(request).await {
        Ok(answer) => IdentityKey::try_from(&answer.identity_key[..])
            .map_err(|_| CallError::Malformed { method: "ResolveUser" }.into()),
        Err(error) if error.is_code("users.not_found") => {
            Err(Error::NoSuchUser(user.clone()).into())
        }
        Err(error) => Err(error.into()),
    }
}

#[derive(Debug, Serialize)]
struct Changed {
    event: &'static str,
    #[serde(flatten)]
    account: Account,
}

impl Report for Changed {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let shown = self.account.shown();
        let name = style.bold(text::line(&shown));
        match self.event {
            "user_banned" => writeln!(out, "{name} is banned from the server."),
            _ => writeln!(out, "{name} is not banned from the server."),
        }
    }
}

async fn ban(
    context: &Context,
    person: &PersonArg,
    reason: &str,
    duration: Option<BanDuration>,
) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let key = key_of(messenger, person).await?;
        let request = v1::BanUserRequest {
            identity_key: key.as_bytes().to_vec().into(),
            reason: reason.to_owned(),
            duration_secs: duration.map_or(0, |BanDuration(seconds)| seconds),
            ..Default::default()
        };
        messenger.client().call::<methods::BanUser>(request).await?;
        report(context, messenger, "user_banned", &key).await
    })
    .await
}

async fn unban(context: &Context, person: &PersonArg) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let key = key_of(messenger, person).await?;
        let request = v1::UnbanUserRequest {
            identity_key: key.as_bytes().to_vec().into(),
            ..Default::default()
        };
        messenger.client().call::<methods::UnbanUser>(request).await?;
        report(context, messenger, "user_unbanned", &key).await
    })
    .await
}

async fn report(
    context: &Context,
    messenger: &Messenger,
    event: &'static str,
    key: &IdentityKey,
) -> Result<(), CliError> {
    let account = Account::of(messenger, key.as_bytes()).await?;
    context.output.report(&Changed { event, account })
}

#[derive(Debug, Serialize)]
struct Banned {
    #[serde(flatten)]
    account: Account,
    reason: String,
    banned_at: u64,
    /// `null` for a permanent ban.
    expires_at: Option<u64>,
}

impl Report for Banned {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let shown = self.account.shown();
        let name = style.bold(text::line(&shown));
        writeln!(out, "{name}  {}", ban_line(&self.reason, self.expires_at.map(UnixMillis)))
    }
}

/// Returns the end and the reason of a ban for people.
pub(super) fn ban_line(reason: &str, expires_at: Option<UnixMillis>) -> String {
    let end = expires_at.map_or("permanent".to_owned(), |at| format!("until {}", text::utc(at)));
    if reason.is_empty() { end } else { format!("{end}  {}", text::line(reason)) }
}

/// Converts seconds of the protocol to the milliseconds of `--json`.
const fn millis(seconds: u64) -> u64 {
    seconds.saturating_mul(1_000)
}

async fn bans(context: &Context) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let request = v1::ListBannedRequest::default();
        let users = messenger.client().call::<methods::ListBanned>(request).await?.users;
        if users.is_empty() {
            context.output.note("No user is banned.");
        }
        for user in users {
            context.output.report(&Banned {
                account: Account::of(messenger, &user.identity_key).await?,
                reason: user.reason,
                banned_at: millis(user.banned_at),
                expires_at: (user.expires_at != 0).then(|| millis(user.expires_at)),
            })?;
        }
        Ok(())
    })
    .await
}

/// A report of a user.
#[derive(Debug, Serialize)]
struct Reported {
    id: u64,
    reporter: Account,
    /// The conversation, in hexadecimal digits.
    conversation: String,
    at: u64,
    /// The encrypted report, in hexadecimal digits.
    encrypted_report: String,
}

impl Report for Reported {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let shown = self.reporter.shown();
        let name = style.bold(text::line(&shown));
        let (at, bytes) = (text::utc(UnixMillis(self.at)), self.encrypted_report.len() / 2);
        writeln!(out, "{}  {at}  by {name}, {}", self.id, text::count(bytes, "byte"))
    }
}

async fn reports(context: &Context, limit: u32, skip: u32) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let (mut offset, mut left) = (skip, limit);
        while left > 0 {
            let request = v1::ListReportsRequest { limit: left, offset, ..Default::default() };
            let page = messenger.client().call::<methods::ListReports>(request).await?.reports;
            if page.is_empty() {
                break;
            }
            let count = u32::try_from(page.len()).unwrap_or(u32::MAX);
            (offset, left) = (offset.saturating_add(count), left.saturating_sub(count));
            for report in page {
                context.output.report(&Reported {
                    id: report.id,
                    reporter: Account::of(messenger, &report.reporter_identity).await?,
                    conversation: hex::encode(&report.conversation_id),
                    at: millis(report.timestamp),
                    encrypted_report: hex::encode(&report.encrypted_report),
                })?;
            }
        }
        if offset == skip {
            context.output.note("There are no reports.");
        }
        Ok(())
    })
    .await
}
