//! Finds the servers' programs. For a missing one the error names the Debian package.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};

/// A server program that tests need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Postgres,
    Redis,
    Nats,
}

impl Program {
    const fn file(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Redis => "redis-server",
            Self::Nats => "nats-server",
        }
    }

    const fn debian_package(self) -> &'static str {
        match self {
            Self::Postgres => "postgresql",
            Self::Redis => "redis-server",
            Self::Nats => "nats-server",
        }
    }

    /// Returns the oldest version with all features that the store uses, as major and minor.
    const fn oldest_version(self) -> (u32, u32) {
        match self {
            Self::Postgres => (15, 0),
            Self::Redis => (7, 0),
            Self::Nats => (2, 9),
        }
    }

    /// Returns the path of the program, after checking its version.
    pub(crate) fn find(self) -> anyhow::Result<PathBuf> {
        self.find_in(folders())
    }

    fn find_in(self, folders: Vec<PathBuf>) -> anyhow::Result<PathBuf> {
        let Some(path) =
            folders.into_iter().map(|dir| dir.join(self.file())).find(|path| path.is_file())
        else {
            bail!(
                "{} is not installed, and tests need it: `apt-get install {}` (scripts/test does it)",
                self.file(),
                self.debian_package()
            );
        };
        let output = version(&path)?;
        let found = major_and_minor(&output)
            .with_context(|| format!("no version in the output of {}: {output}", path.display()))?;
        let (major, minor) = self.oldest_version();
        ensure!(
            found >= (major, minor),
            "{} is {}.{}, tests need {major}.{minor} or newer: install a newer `{}`",
            path.display(),
            found.0,
            found.1,
            self.debian_package()
        );
        Ok(path)
    }
}

/// Returns the path of SeaweedFS, which `scripts/tools` installs from a Python package into
/// `target/tools`.
pub(crate) fn seaweed() -> anyhow::Result<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/bin");
    folders()
        .into_iter()
        .chain([tools])
        .map(|dir| dir.join("weed"))
        .find(|path| path.is_file())
        .context("SeaweedFS is not installed, and tests need it (scripts/test installs it)")
}

/// Returns the output of `--version`.
pub(crate) fn version(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Returns the folders of the PATH, of system programs, and Debian's for Postgres, newest version
/// first.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<_> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    folders.extend(["/usr/sbin", "/usr/local/bin", "/usr/local/sbin"].map(PathBuf::from));
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    folders.extend(versions.into_iter().map(|(_, bin)| bin));
    folders
}

/// Returns the first `N.N` in a text such as `Redis server v=7.0.15 sha=...` or
/// `postgres (PostgreSQL) 15.18 (Debian ...)`.
fn major_and_minor(output: &str) -> Option<(u32, u32)> {
    output.split(|c: char| !(c.is_ascii_digit() || c == '.')).find_map(|word| {
        let mut numbers = word.split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_all_programs_are_parsed() {
        for (output, version) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", (15, 18)),
            ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64", (7, 0)),
            ("nats-server: v2.9.10", (2, 9)),
        ] {
            assert_eq!(major_and_minor(output), Some(version), "{output}");
        }
        assert_eq!(major_and_minor("no version here."), None);
    }

    #[test]
    fn a_missing_program_is_reported_with_its_package() {
        for (program, package) in [
            (Program::Postgres, "apt-get install postgresql "),
            (Program::Redis, "apt-get install redis-server "),
            (Program::Nats, "apt-get install nats-server "),
        ] {
            program.find().expect("scripts/test installs it");
            let missing = program.find_in(vec!["/nonexistent".into()]).unwrap_err().to_string();
            assert!(missing.replace('`', " ").contains(package), "{missing}");
        }
    }

    #[test]
    fn a_program_that_is_too_old_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("redis-server");
        std::fs::write(&old, "#!/bin/sh\necho Redis server v=6.0.16 sha=0\n").unwrap();
        std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o755)).unwrap();
        let refused = Program::Redis.find_in(vec![dir.path().to_owned()]).unwrap_err();
        assert!(refused.to_string().contains("is 6.0, tests need 7.0"), "{refused}");
    }
}
