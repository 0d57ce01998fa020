//! Commands that need neither server nor password: the profiles on this machine.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use qpq_client::{Profile, ProfileError, ProfileStatus};
use serde::Serialize;

use crate::{
    compose::Context,
    error::CliError,
    output::{Report, Style},
    text,
};

/// One profile.
#[derive(Debug, Serialize)]
struct Listed {
    profile: String,
    username: String,
    server: String,
    /// Whether commands can use the profile without a password.
    unlocked: bool,
    registered: bool,
}

impl Report for Listed {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let state = match (self.registered, self.unlocked) {
            (false, _) => "registration interrupted",
            (true, true) => "logged in",
            (true, false) => "logged out",
        };
        let Self { profile, username, server, .. } = self;
        let profile = style.bold(format_args!("{profile:<12}"));
        writeln!(out, "{profile} {username} on {}, {state}", text::line(server))
    }
}

pub(crate) fn profiles(context: &Context) -> Result<(), CliError> {
    let names = names(context.profiles()).map_err(|error| {
        CliError::io(format_args!("cannot list {}", context.profiles().display()), &error)
    })?;
    let mut found = false;
    for name in names {
        let dir = context.profiles().join(&name);
        match Profile::read(&dir) {
            Ok(profile) => {
                found = true;
                context.output.report(&Listed {
                    profile: name,
                    username: profile.username.to_string(),
                    server: profile.server,
                    unlocked: context.keyring.get(&dir).is_some(),
                    registered: profile.status == ProfileStatus::Registered,
                })?;
            }
            // A refused registration has left the directory behind.
            Err(ProfileError::Missing(_)) => {}
            Err(error) => context.output.note(format_args!("{name}: {error}")),
        }
    }
    if !found {
        context
            .output
            .note("There are no profiles yet. Make one: qpq register USERNAME --server HOST:PORT");
    }
    Ok(())
}

fn names(profiles: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(profiles) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}
