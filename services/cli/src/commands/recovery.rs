//! `qpq recovery`: the bundle with which an account is brought back.

use std::io::{self, Write};

use qpq_client::{RecoveryCheck, RecoveryStatus};
use serde::Serialize;

use super::opened;
use crate::{
    args::RecoveryCommand,
    compose::Context,
    error::{CliError, Exit},
    output::{Report, Style},
    password::Source,
    text,
};

/// Runs one command about recovery.
pub(super) async fn run(context: &Context, command: RecoveryCommand) -> Result<(), CliError> {
    match command {
        RecoveryCommand::Show => show(context).await,
        RecoveryCommand::Verify { code_file } => {
            verify(context, code_file.map_or(Source::Terminal, Source::File)).await
        }
        RecoveryCommand::Status => status(context).await,
        RecoveryCommand::Remove => remove(context).await,
    }
}

#[derive(Debug, Serialize)]
struct Shown {
    event: &'static str,
    /// The twelve words, separated by spaces.
    code: String,
}

impl Report for Shown {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        writeln!(out, "Your recovery code. Write it down: it is shown only now.")?;
        let words: Vec<_> = self.code.split(' ').collect();
        for (row, words) in words.chunks(4).enumerate() {
            let numbered = words.iter().zip(1 + 4 * row..);
            let line: String =
                numbered.map(|(word, number)| format!("{number:>4}. {word:<9}")).collect();
            writeln!(out, "{}", style.bold(line.trim_end()))?;
        }
        writeln!(out, "The code and your password bring the account back on a new machine.")?;
        writeln!(out, "An earlier code is no longer valid.")
    }
}

async fn show(context: &Context) -> Result<(), CliError> {
    let code = opened::with_news(context, async |messenger| {
        let password = context.password.known().await?;
        let creating = Box::pin(messenger.create_recovery(&password));
        Ok(context.progress.during("storing the bundle", creating).await?)
    })
    .await?;
    context.output.report(&Shown { event: "recovery_code", code: code.words().join(" ") })
}

#[derive(Debug, Serialize)]
struct Done {
    event: &'static str,
    #[serde(skip)]
    message: &'static str,
}

impl Report for Done {
    fn human(&self, out: &mut dyn Write, _: Style) -> io::Result<()> {
        writeln!(out, "{}", self.message)
    }
}

async fn verify(context: &Context, source: Source) -> Result<(), CliError> {
    let checked = opened::with(context, async |messenger| {
        let password = context.password.known().await?;
        let code = source.recovery_code().await?;
        let checking = Box::pin(messenger.verify_recovery(&password, &code));
        Ok(context.progress.during("checking the bundle", checking).await?)
    })
    .await?;
    let failure = |code, message, hint| CliError::new(Exit::Failure, code, message).hint(hint);
    Err(match checked {
        RecoveryCheck::Opens => {
            return context.output.report(&Done {
                event: "recovery_verified",
                message: "The code and the password open the recovery bundle.",
            });
        }
        RecoveryCheck::WrongCode => failure(
            "client.recovery_code",
            "the code does not open the recovery bundle",
            "a later `qpq recovery show` has replaced it; run that again for a new one",
        ),
        RecoveryCheck::OldPassword => failure(
            "client.recovery_sealed",
            "the code opens the recovery bundle, the present password does not",
            "run `qpq recv` on the device that keeps the bundle, or `qpq recovery show` here",
        ),
        RecoveryCheck::Neither => failure(
            "client.recovery_sealed",
            "neither the code nor the password opens the recovery bundle",
            "run `qpq recovery show` for a new bundle and code",
        ),
        RecoveryCheck::Absent => failure(
            "client.no_recovery",
            "the account has no recovery bundle",
            "run `qpq recovery show`",
        ),
    })
}

#[derive(Debug, Serialize)]
struct Status {
    /// Whether this device keeps the bundle up to date.
    kept: bool,
    version: Option<u64>,
    /// Unix milliseconds, by the clock of this machine.
    stored_at: Option<u64>,
    /// Whether conversations or contacts have changed since.
    outdated: Option<bool>,
}

impl Report for Status {
    fn human(&self, out: &mut dyn Write, _: Style) -> io::Result<()> {
        let Some(stored_at) = self.stored_at.filter(|_| self.kept) else {
            writeln!(out, "This device keeps no recovery bundle.")?;
            return writeln!(out, "Another device may, or run `qpq recovery show`.");
        };
        let at = text::utc(qpq_client::UnixMillis(stored_at));
        writeln!(out, "This device keeps the recovery bundle up to date.")?;
        writeln!(out, "  stored  {at}")?;
        match self.outdated {
            Some(true) => writeln!(out, "  changed since then; the next `qpq recv` stores it"),
            _ => writeln!(out, "  nothing has changed since"),
        }
    }
}

async fn status(context: &Context) -> Result<(), CliError> {
    let status =
        opened::locally(context, async |messenger, _| Ok(messenger.recovery_status().await?))
            .await?;
    let of = |value: fn(RecoveryStatus) -> u64| status.map(value);
    context.output.report(&Status {
        kept: status.is_some(),
        version: of(|status| status.version),
        stored_at: of(|status| status.stored_at.0),
        outdated: status.map(|status| status.is_outdated),
    })
}

async fn remove(context: &Context) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let password = context.password.known().await?;
        let removing = Box::pin(messenger.remove_recovery(&password));
        Ok(context.progress.during("removing the bundle", removing).await?)
    })
    .await?;
    context.output.report(&Done {
        event: "recovery_removed",
        message: "The recovery bundle is removed from the server.",
    })
}
