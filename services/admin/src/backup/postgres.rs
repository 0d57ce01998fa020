//! The client programs of Postgres, which dump and restore databases.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use anyhow::{Context as _, bail};
use tokio::process::Command;

/// A program of the package `postgresql-client`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Program {
    Dump,
    Restore,
    Psql,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Dump => "pg_dump",
            Self::Restore => "pg_restore",
            Self::Psql => "psql",
        }
    }

    /// Returns a command for the program, found on the PATH, with the variables to connect with.
    pub(super) fn command(self, environment: &[(&'static str, String)]) -> Command {
        let mut command = Command::new(self.name());
        command
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Returns the error of a program that did not start.
    pub(super) fn not_started(self, error: std::io::Error) -> anyhow::Error {
        if error.kind() == std::io::ErrorKind::NotFound {
            return anyhow::anyhow!(
                "{} is not installed, and is needed to back up or restore a cluster's database: \
                 install the client programs of Postgres (the package postgresql-client), of the \
                 server's version or newer",
                self.name()
            );
        }
        anyhow::Error::new(error).context(format!("{} cannot be started", self.name()))
    }

    /// Runs `command` to its end. Fails if the command fails.
    pub(super) async fn run(self, mut command: Command) -> anyhow::Result<Output> {
        let output = command.output().await.map_err(|error| self.not_started(error))?;
        self.check(output)
    }

    /// Returns the output of a successful run, else an error with the messages of the program.
    pub(super) fn check(self, output: Output) -> anyhow::Result<Output> {
        if output.status.success() {
            return Ok(output);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<_> =
            errors.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let errors = errors.join("; ");
        if errors.contains("server version mismatch") {
            bail!(
                "{} is older than the server ({errors}): install the client programs of Postgres \
                 of the server's version or newer",
                self.name()
            );
        }
        bail!("{} failed ({}): {errors}", self.name(), output.status)
    }
}

/// Dumps the exported `snapshot` of the database of `environment` to the file `to`.
pub(super) async fn dump(
    environment: &[(&'static str, String)],
    snapshot: &str,
    to: &Path,
) -> anyhow::Result<()> {
    let mut command = Program::Dump.command(environment);
    command.args(["--format=custom", "--no-owner", "--no-privileges", "--no-password"]);
    command.arg(format!("--snapshot={snapshot}")).arg("--file").arg(to);
    Program::Dump.run(command).await?;
    qpq_durable_file::sync(to).with_context(|| format!("{} cannot be made durable", to.display()))
}

/// Returns a command that writes the dump `from` as SQL to its standard output.
pub(super) fn as_sql(from: &Path, only_data: bool) -> Command {
    let mut command = Program::Restore.command(&[]);
    command.args(["--no-owner", "--no-privileges", "--file=-"]);
    if only_data {
        command.arg("--data-only");
    }
    command.arg(from);
    command
}

/// Returns the table of a COPY statement, without its schema.
///
/// The statement has the form `COPY public.account (id, …) FROM stdin;`.
pub(super) fn copied_table(line: &str) -> Option<String> {
    let rest = line.strip_prefix("COPY ")?.strip_suffix(" FROM stdin;")?;
    let name = rest.split(" (").next()?;
    Some(name.rsplit('.').next()?.trim_matches('"').to_owned())
}

/// Returns the error for a damaged dump.
pub(super) fn damaged(path: &Path, why: &str) -> anyhow::Error {
    let path: PathBuf = path.to_owned();
    anyhow::anyhow!("{} is damaged: {why}. Use another backup", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_copy_statement_is_parsed() {
        let table = |line| copied_table(line);
        assert_eq!(table("COPY public.account (id, username) FROM stdin;").unwrap(), "account");
        assert_eq!(table("COPY public.\"user\" (id) FROM stdin;").unwrap(), "user");
        assert_eq!(table("SELECT 1;"), None);
        assert_eq!(table("COPY public.account (id) TO stdout;"), None);
    }
}
