//! Runs the program as an operator would.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What a directory that was made holds.
pub(crate) const FILES: [&str; 8] = [
    "cluster-id",
    "delivery-key.bin",
    "opaque-setup.bin",
    "reset-key",
    "server-cert.der",
    "server-key.der",
    "ticket-keys",
    "token-key",
];

/// The end of a run: exit code, standard output, standard error.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) code: Option<i32>,
    pub(crate) printed: String,
    pub(crate) said: String,
}

/// Runs the program with nothing of the test's own environment.
pub(crate) fn run_with(arguments: &[&str], variables: &[(&str, &str)]) -> End {
    let output = Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    End {
        code: output.status.code(),
        printed: String::from_utf8(output.stdout).unwrap(),
        said: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs the program, which must succeed and not complain; what it printed.
pub(crate) fn run(arguments: &[&str]) -> String {
    let end = run_with(arguments, &[]);
    assert_eq!((end.code, end.said.as_str()), (Some(0), ""), "{end:?}");
    end.printed
}

/// Runs the program, which must fail with `code`, print nothing, and say why; that it says.
pub(crate) fn refusal(code: i32, arguments: &[&str]) -> String {
    let end = run_with(arguments, &[]);
    assert_eq!((end.code, end.printed.as_str()), (Some(code), ""), "{end:?}");
    if code == 1 {
        assert!(end.said.starts_with("qpq-admin: ") && end.said.lines().count() == 1, "{end:?}");
    }
    end.said
}

/// A place for directories, removed at the end of the test.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With a cluster's directory in it.
    pub(crate) fn with_fleet() -> (Self, PathBuf) {
        let place = Self::new();
        let fleet = place.path("fleet");
        run(&["init", "--out", text(&fleet)]);
        (place, fleet)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Names and contents.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
