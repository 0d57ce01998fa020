//! Postgres' own programs, which dump and restore its databases.

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

    /// The program as found on the PATH, with the variables that it connects by.
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

    /// Explains why the program did not start.
    pub(super) fn not_started(self, error: std::io::Error) -> anyhow::Error {
        if error.kind() == std::io::ErrorKind::NotFound {
            return anyhow::anyhow!(
                "{} is not installed, and a cluster's database is backed up and restored with it: install Postgres' \
                 client programs (the package postgresql-client), of the server's version or newer",
                self.name()
            );
        }
        anyhow::Error::new(error).context(format!("{} cannot be started", self.name()))
    }

    /// Runs `command` to its end, which must be a good one.
    pub(super) async fn run(self, mut command: Command) -> anyhow::Result<Output> {
        let output = command.output().await.map_err(|error| self.not_started(error))?;
        self.check(output)
    }

    /// The output of a run that ended well; else what the program said, in one line.
    pub(super) fn check(self, output: Output) -> anyhow::Result<Output> {
        if output.status.success() {
            return Ok(output);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let said = said.join("; ");
        if said.contains("server version mismatch") {
            bail!(
                "{} is older than the server ({said}): install Postgres' client programs of the server's version or newer",
                self.name()
            );
        }
        bail!("{} failed ({}): {said}", self.name(), output.status)
    }
}

/// Dumps the database of `environment`, as the exported `snapshot` shows it, to the file `to`.
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

/// A program that writes the dump `from` as SQL to its standard output.
pub(super) fn as_sql(from: &Path, only_data: bool) -> Command {
    let mut command = Program::Restore.command(&[]);
    command.args(["--no-owner", "--no-privileges", "--file=-"]);
    if only_data {
        command.arg("--data-only");
    }
    command.arg(from);
    command
}

/// The text of a COPY statement's table, without its schema: `COPY public.account (id, …) FROM
/// stdin;`.
pub(super) fn copied_table(line: &str) -> Option<String> {
    let rest = line.strip_prefix("COPY ")?.strip_suffix(" FROM stdin;")?;
    let name = rest.split(" (").next()?;
    Some(name.rsplit('.').next()?.trim_matches('"').to_owned())
}

/// For errors about a dump.
pub(super) fn damaged(path: &Path, why: &str) -> anyhow::Error {
    let path: PathBuf = path.to_owned();
    anyhow::anyhow!("{} is damaged: {why}. Use another backup", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_copy_is_found() {
        let table = |line| copied_table(line);
        assert_eq!(table("COPY public.account (id, username) FROM stdin;").unwrap(), "account");
        assert_eq!(table("COPY public.\"user\" (id) FROM stdin;").unwrap(), "user");
        assert_eq!(table("SELECT 1;"), None);
        assert_eq!(table("COPY public.account (id) TO stdout;"), None);
    }
}
