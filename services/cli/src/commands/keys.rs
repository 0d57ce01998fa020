//! `qpq keys`: the own key, and the safety numbers by which two people verify each other's keys.

use std::io::{self, Write};

use qpq_client::{
    Error, Messenger, MlsError, UnixMillis, Username, fingerprint, methods, safety_number, v1,
};
use serde::Serialize;

use super::opened;
use crate::{
    compose::Context,
    error::CliError,
    output::{Report, Style},
    text,
};

#[derive(Debug, Serialize)]
struct OwnKeys {
    username: String,
    identity: String,
    fingerprint: String,
    /// The number of packages with which others can begin conversations. The server issues each
    /// once.
    key_packages: u32,
    /// Whether there is also a last-resort package, which is never used up.
    last_resort: bool,
}

impl Report for OwnKeys {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { username, identity, fingerprint, key_packages, last_resort } = self;
        let spare = if *last_resort { ", and a last resort" } else { "" };
        writeln!(out, "{}", style.bold(username))?;
        writeln!(out, "  identity      {identity}")?;
        writeln!(out, "  fingerprint   {fingerprint}")?;
        writeln!(out, "  key packages  {key_packages} on the server{spare}")
    }
}

#[derive(Debug, Serialize)]
struct Comparison {
    username: String,
    identity: String,
    safety_number: String,
    /// The time of the comparison (`--verified`), in Unix milliseconds; null without one.
    compared_at: Option<u64>,
}

impl Report for Comparison {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { username, identity, safety_number, compared_at } = self;
        writeln!(out, "Safety number with {} ({identity:.16}…):", style.bold(username))?;
        for row in rows(safety_number) {
            writeln!(out, "  {row}")?;
        }
        if let Some(at) = compared_at {
            return writeln!(out, "Compared on {}.", text::utc(UnixMillis(*at)));
        }
        writeln!(
            out,
            "It must be the same where {username} runs `qpq keys` with your name. If it is not,"
        )?;
        writeln!(out, "another party stands between you: do not trust the server.")?;
        writeln!(out, "If it is, note that with `qpq keys {username} --verified`.")
    }
}

/// Returns the lines in which a safety number is shown.
fn rows(safety_number: &str) -> Vec<String> {
    let groups: Vec<_> = safety_number.split(' ').collect();
    groups.chunks(4).map(|row| row.join(" ")).collect()
}

/// The reaction to a changed key of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changed {
    Refuse,
    Accept,
}

/// The comparison of the safety number: as noted before, or made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compared {
    AsNoted,
    Now,
}

pub(crate) async fn show(
    context: &Context,
    user: Option<&Username>,
    changed: Changed,
    compared: Compared,
) -> Result<(), CliError> {
    opened::with(context, async |messenger| match user {
        None => context.output.report(&own(messenger).await?),
        Some(user) => context.output.report(&compare(messenger, user, changed, compared).await?),
    })
    .await
}

async fn own(messenger: &Messenger) -> Result<OwnKeys, Error> {
    let count = v1::CountKeyPackagesRequest::default();
    let stock = messenger.client().call::<methods::CountKeyPackages>(count).await?;
    let profile = messenger.profile();
    Ok(OwnKeys {
        username: profile.username.to_string(),
        identity: profile.identity.to_string(),
        fingerprint: fingerprint(&profile.identity),
        key_packages: stock.available,
        last_resort: stock.has_last_resort,
    })
}

async fn compare(
    messenger: &Messenger,
    user: &Username,
    changed: Changed,
    compared: Compared,
) -> Result<Comparison, CliError> {
    let me = messenger.profile().identity;
    let person = match messenger.resolve(user).await {
        Err(Error::IdentityChanged { .. }) if changed == Changed::Accept => {
            messenger.accept_new_identity(user).await?
        }
        Err(error) => return Err(refused(messenger, user, error).await?),
        Ok(person) => person,
    };
    if person.identity == me {
        return Err(Error::from(MlsError::Yourself).into());
    }
    let compared_at = match compared {
        Compared::Now => Some(messenger.mark_compared(user).await?),
        Compared::AsNoted => messenger.compared_at(&person.identity).await?,
    };
    Ok(Comparison {
        username: person.username.to_string(),
        identity: person.identity.to_string(),
        safety_number: safety_number(&me, &person.identity),
        compared_at: compared_at.map(|at| at.0),
    })
}

/// Returns the reason why no safety number is shown. The hint has the number with the new key,
/// which has to be compared before the key is accepted.
async fn refused(messenger: &Messenger, user: &Username, error: Error) -> Result<CliError, Error> {
    let Error::IdentityChanged { known, now, .. } = &error else { return Ok(error.into()) };
    let was = match messenger.compared_at(known).await? {
        Some(at) => format!("you compared the old one on {}", text::utc(at)),
        None => "you never compared the old one".to_owned(),
    };
    let number = rows(&safety_number(&messenger.profile().identity, now)).join("\n       ");
    let hint = format!(
        "the safety number with the new key is\n       {number}\n     ({was}); if {user} confirms \
         in person or by phone that it is theirs, run `qpq keys {user} --accept`"
    );
    Ok(CliError::from(error).hint(hint))
}
