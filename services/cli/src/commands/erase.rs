//! `qpq account delete`: deletes the account, and the profile with it.

use std::io::{self, BufRead as _, IsTerminal as _, Write};

use qpq_client::{Error, Profile};
use serde::Serialize;

use super::opened;
use crate::{
    compose::Context,
    error::{CliError, Exit},
    output::{Report, Style},
};

#[derive(Debug, Serialize)]
struct Deleted {
    event: &'static str,
    username: String,
    server: String,
    /// The directory of the profile, if it is still there.
    profile_dir: Option<String>,
}

impl Report for Deleted {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let username = style.bold(&self.username);
        writeln!(out, "The account {username} on {} is deleted.", self.server)?;
        match &self.profile_dir {
            None => writeln!(out, "Its profile on this machine is removed."),
            Some(dir) => writeln!(out, "Its profile is still on this machine: {dir}"),
        }
    }
}

/// Deletes the account after its name was typed.
pub(crate) async fn delete(context: &Context, keep_profile: bool) -> Result<(), CliError> {
    let dir = context.dir();
    let profile = Profile::read(&dir).map_err(Error::from)?;
    confirm(context, profile.username.as_str()).await?;
    // The password is also asked for if the profile is unlocked: the server requires it.
    let password = context.password.known().await?;
    opened::with(context, async |messenger| {
        let deleting = Box::pin(messenger.delete_account(&password));
        Ok(context.progress.during("deleting the account", deleting).await?)
    })
    .await?;
    context.keyring.remove(&dir)?;
    let mut profile_dir = Some(dir.display().to_string());
    if !keep_profile {
        match std::fs::remove_dir_all(&dir) {
            Ok(()) => profile_dir = None,
            Err(error) => context.output.note(format_args!(
                "Note: the profile could not be removed: {error}. Remove it yourself."
            )),
        }
    }
    context.output.report(&Deleted {
        event: "account_deleted",
        username: profile.username.to_string(),
        server: profile.server,
        profile_dir,
    })
}

/// Reads the name of the account from standard input, and fails if it is another one.
async fn confirm(context: &Context, username: &str) -> Result<(), CliError> {
    if io::stdin().is_terminal() {
        context.output.note(format_args!(
            "This deletes the account {username} and its messages on the server permanently.\n\
             Type its name to confirm:"
        ));
    }
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let line = read.await.expect("reading a line does not panic");
    let line = line.map_err(|error| CliError::io("cannot read the name", &error))?;
    if line.trim() == username {
        return Ok(());
    }
    let message = "the name of the account was not confirmed, and nothing was deleted";
    Err(CliError::new(Exit::Failure, "client.not_confirmed", message)
        .hint(format!("give the name on standard input: echo {username} | qpq account delete")))
}
