//! `qpq keys`: one's own key, and the numbers by which two people know that nobody stands between
//! them.

use std::io::{self, Write};

use qpq_client::{Error, Messenger, MlsError, Username, fingerprint, methods, safety_number, v1};
use serde::Serialize;

use super::opened;
use crate::{
    compose::Context,
    fault::Fault,
    output::{Report, Style},
};

#[derive(Debug, Serialize)]
struct OwnKeys {
    username: String,
    identity: String,
    fingerprint: String,
    /// With which others can begin conversations; the server gives each out once.
    key_packages: u32,
    /// Whether there is one more that never runs out.
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
}

impl Report for Comparison {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { username, identity, safety_number } = self;
        writeln!(out, "Safety number with {} ({identity:.16}…):", style.bold(username))?;
        let groups: Vec<_> = safety_number.split(' ').collect();
        for row in groups.chunks(4) {
            writeln!(out, "  {}", row.join(" "))?;
        }
        writeln!(
            out,
            "It must be the same where {username} runs `qpq keys` with your name. If it is not,"
        )?;
        writeln!(out, "somebody stands between you: do not trust the server.")
    }
}

/// What to do about a key of somebody that has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changed {
    Refuse,
    Accept,
}

pub(crate) async fn show(
    context: &Context,
    user: Option<&Username>,
    changed: Changed,
) -> Result<(), Fault> {
    opened::with(context, async |messenger| match user {
        None => context.output.report(&own(messenger).await?),
        Some(user) => context.output.report(&compare(messenger, user, changed).await?),
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
) -> Result<Comparison, Error> {
    let person = match (messenger.resolve(user).await, changed) {
        (Err(Error::IdentityChanged { .. }), Changed::Accept) => {
            messenger.accept_new_identity(user).await?
        }
        (resolved, _) => resolved?,
    };
    if person.identity == messenger.profile().identity {
        return Err(MlsError::Yourself.into());
    }
    Ok(Comparison {
        username: person.username.to_string(),
        identity: person.identity.to_string(),
        safety_number: safety_number(&messenger.profile().identity, &person.identity),
    })
}
