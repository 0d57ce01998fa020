//! `scripts/advisories`, with a `cargo` in place of the real one.

use std::{
    env, fs, iter,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// The outcome of a command of cargo-deny.
#[derive(Clone, Copy)]
enum Deny {
    Succeeds,
    Fails,
}

/// Runs the script. `fetch` is the download of the database, `check` the search for findings.
fn run(home: &Path, fetch: Deny, check: Deny) -> Output {
    let code = |outcome| match outcome {
        Deny::Succeeds => 0,
        Deny::Fails => 1,
    };
    let programs = TempDir::new().expect("a directory");
    let cargo = programs.path().join("cargo");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n  'deny '*' fetch db') exit {};;\n  \
         'deny '*' check advisories') echo checked; exit {};;\nesac\nexit 9\n",
        code(fetch),
        code(check)
    );
    fs::write(&cargo, script).expect("written");
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("own file");
    let path = env::var_os("PATH").expect("a path");
    let directories = iter::once(programs.path().to_owned()).chain(env::split_paths(&path));
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/advisories"))
        .env("PATH", env::join_paths(directories).expect("a path"))
        .env("CARGO_HOME", home)
        .stdin(Stdio::null())
        .output()
        .expect("it runs")
}

/// Creates a copy of the database with one commit.
fn create_copy(home: &Path) {
    let copy = home.join("advisory-dbs/advisory-db-1");
    fs::create_dir_all(&copy).expect("created");
    let git = |arguments: &[&str]| {
        let day = "2026-01-02T03:04:05Z";
        let ran = Command::new("git")
            .args(["-C", copy.to_str().expect("text"), "-c", "user.name=a", "-c", "user.email=a@b"])
            .args(arguments)
            .envs([("GIT_AUTHOR_DATE", day), ("GIT_COMMITTER_DATE", day)])
            .output()
            .expect("git");
        assert!(ran.status.success(), "{ran:?}");
    };
    git(&["init", "--quiet"]);
    git(&["commit", "--quiet", "--allow-empty", "-m", "advisories"]);
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("text")
}

#[test]
fn without_network_and_copy_the_check_is_skipped_with_a_message() {
    let home = TempDir::new().expect("a directory");
    let output = run(home.path(), Deny::Fails, Deny::Fails);
    assert!(output.status.success(), "{output:?}");
    let expected = format!(
        "advisories: NOT CHECKED: the database cannot be reached, and there is no copy of it in \
         {}/advisory-dbs\n",
        home.path().display()
    );
    assert_eq!(text(&output), expected);
}

#[test]
fn without_network_the_copy_is_checked() {
    let home = TempDir::new().expect("a directory");
    create_copy(home.path());
    let output = run(home.path(), Deny::Fails, Deny::Succeeds);
    assert!(output.status.success(), "{output:?}");
    let expected = "advisories: cannot reach the database; checking against the copy of \
                    2026-01-02\nchecked\n";
    assert_eq!(text(&output), expected);
}

#[test]
fn a_finding_of_the_check_fails_the_script() {
    let home = TempDir::new().expect("a directory");
    create_copy(home.path());
    for fetch in [Deny::Succeeds, Deny::Fails] {
        let output = run(home.path(), fetch, Deny::Fails);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    let output = run(home.path(), Deny::Succeeds, Deny::Fails);
    let expected = "advisories: checking against the database of 2026-01-02\nchecked\n";
    assert_eq!(text(&output), expected);
}
