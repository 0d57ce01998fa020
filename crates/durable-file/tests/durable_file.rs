//! The contents that readers find after a success, a failure and a crash.

#![allow(clippy::unwrap_used, reason = "the exception for tests does not reach their helpers")]

use std::{
    env, fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, ExitStatus},
    thread,
    time::Duration,
};

use qpq_durable_file::{Created, Draft, create, publish, replace};

/// The path of the file that a child process of a test writes.
const CHILD_TARGET: &str = "DURABLE_FILE_CHILD_TARGET";

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Runs the test `name` in a child process of the shell, after the commands `setup`. The test
/// writes `target`.
fn run_child(setup: &str, name: &str, target: &Path) -> ExitStatus {
    let script = format!("{setup} exec \"$0\" --exact {name}");
    let mut child = Command::new("sh");
    child.args(["-c", &script]).arg(env::current_exe().unwrap()).env(CHILD_TARGET, target);
    child.output().unwrap().status
}

#[test]
fn a_replaced_file_has_the_new_contents_and_mode() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "old, and longer").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    replace(&path, b"new", 0o600).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(mode_of(&path), 0o600);
    assert_eq!(names_in(directory.path()), ["file"]);
}

#[test]
fn an_existing_file_is_not_created_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    assert_eq!(create(&path, b"first", 0o600).unwrap(), Created::New);
    assert_eq!(create(&path, b"second", 0o644).unwrap(), Created::Exists);
    assert_eq!(fs::read(&path).unwrap(), b"first");
    assert_eq!(mode_of(&path), 0o600);
    assert_eq!(names_in(directory.path()), ["file"]);
}

#[test]
fn of_concurrent_creators_exactly_one_creates_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let creators: Vec<_> = (0..8u8)
        .map(|number| {
            let path = path.clone();
            thread::Builder::new()
                .spawn(move || (create(&path, &[number; 4096], 0o600).unwrap(), number))
                .unwrap()
        })
        .collect();
    let outcomes: Vec<_> = creators.into_iter().map(|creator| creator.join().unwrap()).collect();
    let winners: Vec<_> = outcomes.iter().filter(|(created, _)| *created == Created::New).collect();
    let [(_, winner)] = winners[..] else { panic!("{outcomes:?}") };
    assert_eq!(fs::read(&path).unwrap(), [*winner; 4096]);
    assert_eq!(names_in(directory.path()), ["file"]);
}

#[test]
fn a_dropped_draft_leaves_the_old_file_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    replace(&path, b"old", 0o600).unwrap();
    let mut draft = Draft::new(&path, 0o600).unwrap();
    draft.write_all(b"ne").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(draft);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names_in(directory.path()), ["file"]);
}

#[test]
fn replacing_a_directory_fails_and_leaves_it_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("directory");
    fs::create_dir(&path).unwrap();
    replace(&path, b"new", 0o600).unwrap_err();
    assert!(path.is_dir());
    assert_eq!(names_in(directory.path()), ["directory"]);
    replace(&directory.path().join("absent/file"), b"new", 0o600).unwrap_err();
}

#[test]
fn a_published_file_replaces_its_target() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("written"), directory.path().join("file"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    publish(&from, &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"new");
    assert_eq!(names_in(directory.path()), ["file"]);
}

/// The limit of the file size is reached after the first bytes of the new contents.
#[test]
fn a_failure_in_the_middle_leaves_the_old_file_and_nothing_else() {
    if let Some(target) = env::var_os(CHILD_TARGET) {
        let contents = [b'n'; 1 << 20];
        for _ in 0..2 {
            replace(Path::new(&target), &contents, 0o600).unwrap_err();
            create(Path::new(&target), &contents, 0o600).unwrap_err();
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    replace(&path, b"old", 0o600).unwrap();
    let name = "a_failure_in_the_middle_leaves_the_old_file_and_nothing_else";
    // With the signal ignored, a write beyond the limit is an error.
    assert!(run_child("trap '' XFSZ; ulimit -f 8;", name, &path).success());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names_in(directory.path()), ["file"]);
}

#[test]
fn a_process_killed_in_the_middle_leaves_the_old_file_and_the_next_write_succeeds() {
    if let Some(target) = env::var_os(CHILD_TARGET) {
        let mut draft = Draft::new(Path::new(&target), 0o600).unwrap();
        draft.write_all(b"ne").unwrap();
        std::process::abort();
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    replace(&path, b"old", 0o600).unwrap();
    let name = "a_process_killed_in_the_middle_leaves_the_old_file_and_the_next_write_succeeds";
    assert!(!run_child("", name, &path).success());
    assert_eq!(names_in(directory.path()).len(), 2, "the temporary file of the killed process");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    replace(&path, b"new", 0o600).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

/// Moves the time of a file's last write back by `age`.
fn set_age(path: &Path, age: Duration) {
    let file = fs::File::options().append(true).open(path).unwrap();
    let now = file.metadata().unwrap().modified().unwrap();
    file.set_modified(now - age).unwrap();
}

#[test]
fn old_temporary_files_of_killed_processes_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let old = Duration::from_secs(2 * 60 * 60);
    for name in ["file.1.0.new", "file.4194304.17.new"] {
        fs::write(at(name), "half").unwrap();
        set_age(&at(name), old);
    }
    let others = ["file.1.new", "file.1.0.2.new", "file.1.x.new", "file.1..new", "files.1.0.new"];
    for name in others {
        fs::write(at(name), "not a temporary file of this target").unwrap();
        set_age(&at(name), old);
    }
    fs::write(at("file.2.0.new"), "being written").unwrap();
    replace(&at("file"), b"new", 0o600).unwrap();
    let mut expected = others.map(str::to_owned).to_vec();
    expected.extend(["file".to_owned(), "file.2.0.new".to_owned()]);
    expected.sort();
    assert_eq!(names_in(directory.path()), expected);
}
