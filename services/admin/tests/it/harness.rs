//! Helpers to run the program as an operator does.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The files of a directory that `init` created.
pub(crate) const FILES: [&str; 9] = [
    "at-rest-keys",
    "cluster-id",
    "delivery-key.bin",
    "opaque-setup.bin",
    "reset-key",
    "server-cert.der",
    "server-key.der",
    "ticket-keys",
    "token-key",
];

/// The exit code and output of a run.
#[derive(Debug)]
pub(crate) struct RunOutput {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the program, without the environment of the test.
pub(crate) fn run_with(arguments: &[&str], variables: &[(&str, &str)]) -> RunOutput {
    let output = Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    RunOutput {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs the program, which must succeed without a warning. Returns its standard output.
pub(crate) fn run(arguments: &[&str]) -> String {
    let end = run_with(arguments, &[]);
    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
    end.stdout
}

/// Runs the program, which must fail with `code` and without output. Returns its standard error.
pub(crate) fn run_failing(code: i32, arguments: &[&str]) -> String {
    let end = run_with(arguments, &[]);
    assert_eq!((end.code, end.stdout.as_str()), (Some(code), ""), "{end:?}");
    if code == 1 {
        assert!(
            end.stderr.starts_with("qpq-admin: ") && end.stderr.lines().count() == 1,
            "{end:?}"
        );
    }
    end.stderr
}

/// A temporary directory, removed at the end of the test.
pub(crate) struct Workspace(tempfile::TempDir);

impl Workspace {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Creates a temporary directory with the shared directory of a cluster in it.
    pub(crate) fn with_shared_dir() -> (Self, PathBuf) {
        let workspace = Self::new();
        let shared = workspace.path("shared");
        run(&["init", "--out", text(&shared)]);
        (workspace, shared)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Returns the names and contents of the files in a directory, without those in its directories.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
