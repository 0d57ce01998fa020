//! Directories that can be opened and those that cannot. Each refusal has its own error, with the
//! step that corrects it.

use std::{
    fs::{self, OpenOptions, Permissions},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
};

use qpq_domain::{IdentityKey, Seq, StoreLimits, UnixMillis, Username};
use qpq_ports::{
    Admission, NewAccount, PageLimit, ReadError, ReadQuery, Reader, Registration, StoreError, View,
};
use qpq_store_embedded::{EmbeddedStore, OpenError};
use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};

use crate::{
    child::Child,
    ops::{Machine, Message, Op, START, key},
};

async fn refused(path: &Path) -> OpenError {
    EmbeddedStore::open(path, StoreLimits::default()).await.expect_err("not usable")
}

async fn open(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path, StoreLimits::default())
        .await
        .unwrap_or_else(|error| panic!("{error}"))
}

async fn sql(path: &Path, statement: &'static str) {
    let options = SqliteConnectOptions::new().filename(path.join("qpq.db")).create_if_missing(true);
    let mut connection = options.connect().await.expect("connect");
    sqlx::query(statement).execute(&mut connection).await.expect("execute");
    connection.close().await.expect("close");
}

#[tokio::test]
async fn a_missing_directory_is_created_with_access_only_for_its_owner() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path().join("some/where");
    let store = open(&path).await;
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    let files: Vec<_> =
        fs::read_dir(&path).expect("readable").map(|entry| entry.expect("entry").path()).collect();
    assert!(files.len() >= 3, "the lock, the database and its log: {files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
    store.close().await;
    let left: Vec<_> =
        fs::read_dir(&path).expect("readable").map(|e| e.expect("entry").file_name()).collect();
    assert!(
        left.iter().all(|name| name == "lock" || name == "qpq.db"),
        "a closed store is one file: {left:?}"
    );
}

#[tokio::test]
async fn a_second_server_is_refused_until_the_first_has_closed() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = open(directory.path()).await;
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::InUse(_)), "{error}");
    let mut child = Child::spawn();
    let error = child.open(directory.path(), StoreLimits::default()).expect_err("in use");
    assert!(error.contains("in use by another server: stop that one first"), "{error}");
    first.stores().maintenance.check().await.expect("undisturbed");

    let stores = first.stores();
    first.close().await;
    assert!(
        matches!(stores.maintenance.check().await, Err(StoreError::Unavailable(_))),
        "a closed store refuses calls"
    );
    child.open(directory.path(), StoreLimits::default()).expect("now it is free");
    assert!(matches!(refused(directory.path()).await, OpenError::InUse(_)));
    child.kill();
    open(directory.path()).await.close().await;
}

#[tokio::test]
async fn a_path_that_is_not_a_directory_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    fs::write(&file, "hello").expect("write");
    for path in [file.clone(), file.join("below")] {
        let error = refused(&path).await;
        assert!(matches!(error, OpenError::NotADirectory(_)), "{error}");
    }
    assert_eq!(fs::read(&file).expect("read"), b"hello");
}

/// The superuser may write everywhere, so a child process runs as a user without permissions.
#[test]
fn a_read_only_directory_is_refused() {
    let parent = tempfile::tempdir().expect("a directory");
    fs::set_permissions(parent.path(), Permissions::from_mode(0o755)).expect("own directory");
    let path = parent.path().join("data");
    fs::create_dir(&path).expect("a directory");
    fs::set_permissions(&path, Permissions::from_mode(0o555)).expect("own directory");
    let mut child = if nix::unistd::geteuid().is_root() {
        let binary = parent.path().join("it");
        fs::copy(std::env::current_exe().expect("this binary"), &binary).expect("copy");
        Child::spawn_as_nobody(&binary)
    } else {
        Child::spawn()
    };
    let error = child.open(&path, StoreLimits::default()).expect_err("read-only");
    assert!(error.contains("make it writable for the user that runs the server"), "{error}");
    let error = child.open(&path.join("below"), StoreLimits::default()).expect_err("read-only");
    assert!(error.contains("make it writable for the user that runs the server"), "{error}");
    fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("own directory");
    child.open(&path, StoreLimits::default()).expect("now it can be written");
}

#[tokio::test]
async fn a_file_that_is_not_a_database_is_refused_and_unchanged() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("qpq.db");
    let text = "this is not a database. ".repeat(1_000);
    fs::write(&file, &text).expect("write");
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert_eq!(fs::read_to_string(&file).expect("read"), text);
}

#[tokio::test]
async fn the_database_of_another_program_is_refused_and_unchanged() {
    let directory = tempfile::tempdir().expect("a directory");
    sql(directory.path(), "CREATE TABLE foreign_table (n INTEGER)").await;
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::NotOurs(_)), "{error}");
    sql(directory.path(), "INSERT INTO foreign_table VALUES (1)").await;
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    open(directory.path()).await.close().await;
    sql(
        directory.path(),
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future', 1, x'00', 0)",
    )
    .await;
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::NewerSchema { found: 9999, .. }), "{error}");
    sql(directory.path(), "DELETE FROM _sqlx_migrations WHERE version = 9999").await;
    open(directory.path()).await.close().await;
}

/// Returns a directory with a few hundred messages, closed in good order.
async fn filled() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path()).await;
    let mut machine = Machine::new(store.stores());
    machine.apply(Op::Register { name: 1, key: 1, record: 1 }, START).await;
    for n in 0..20 {
        let message =
            Message { from: 1, to: 1, channel: n % 2, id: None, size: 3_000, minutes: 200 };
        machine.apply(Op::Enqueue(vec![message; 20]), START).await;
    }
    drop(machine);
    store.close().await;
    directory
}

#[tokio::test]
async fn a_damaged_header_is_found_at_the_start() {
    let directory = filled().await;
    let file = OpenOptions::new().write(true).open(directory.path().join("qpq.db")).expect("open");
    file.write_all_at(&[0xa5; 100], 0).expect("write");
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("restore the latest backup"), "{error}");
}

#[tokio::test]
async fn damage_after_an_unclean_end_is_found_at_the_start() {
    let directory = filled().await;
    let path = directory.path().join("qpq.db");
    // As after a crash, and in a copy that was made while a server ran.
    sql(directory.path(), "UPDATE heartbeat SET clean = 0").await;
    open(directory.path()).await.close().await;
    sql(directory.path(), "UPDATE heartbeat SET clean = 0").await;
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    let pages = fs::metadata(&path).expect("there").len() / 4_096;
    file.write_all_at(&[0xa5; 4_096], pages / 2 * 4_096).expect("write");
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("qpq-admin restore"), "{error}");
}

/// An index lacks rows, as in a copy of files that were written meanwhile.
#[tokio::test]
async fn an_index_that_differs_from_its_table_is_found_after_an_unclean_end() {
    let directory = filled().await;
    sql(directory.path(), "UPDATE heartbeat SET clean = 0").await;
    sql(
        directory.path(),
        "PRAGMA writable_schema = on;
         UPDATE sqlite_schema SET rootpage =
             (SELECT rootpage FROM sqlite_schema WHERE name = 'session_expiry')
          WHERE name = 'message_expiry'",
    )
    .await;
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn a_database_is_clean_only_after_an_end_in_good_order() {
    let directory = filled().await;
    let clean = async || {
        let options = SqliteConnectOptions::new().filename(directory.path().join("qpq.db"));
        let mut connection = options.immutable(true).connect().await.expect("connect");
        let clean: bool = sqlx::query_scalar("SELECT clean FROM heartbeat")
            .fetch_one(&mut connection)
            .await
            .expect("read");
        clean
    };
    assert!(clean().await);
    let mut child = Child::spawn();
    child.open(directory.path(), StoreLimits::default()).expect("free");
    assert!(!clean().await, "the file says so without its log");
    child.kill();
    assert!(!clean().await);
    open(directory.path()).await.close().await;
    assert!(clean().await);
}

#[tokio::test]
async fn damage_is_reported_when_a_statement_meets_it() {
    let directory = filled().await;
    let path = directory.path().join("qpq.db");
    let pages = fs::metadata(&path).expect("there").len() / 4_096;
    assert!(pages > 300);
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    // The second half has pages of messages, and perhaps others.
    for page in pages / 2..pages {
        file.write_all_at(&[0xa5; 4_096], page * 4_096).expect("write");
    }
    let store = open(directory.path()).await;
    let inboxes = store.stores().inboxes;
    let read = ReadQuery { reader: Reader::single(key(1)), view: View::All };
    let everything = PageLimit { messages: u32::MAX, bytes: usize::MAX };
    let error = inboxes.peek(read, Seq::ZERO, everything, START).await.expect_err("damaged");
    assert!(matches!(error, ReadError::Store(StoreError::Corrupt(_))), "{error:?}");
    let ack = qpq_ports::Ack { up_to: Some(Seq(400)), ..qpq_ports::Ack::default() };
    let error = inboxes.ack(read, ack, START).await.expect_err("damaged");
    assert!(matches!(error, ReadError::Store(StoreError::Corrupt(_))), "{error:?}");
    for _ in 0..2 {
        let error = store.stores().maintenance.check().await.expect_err("readiness says so");
        let cause = std::error::Error::source(&error).expect("a cause").to_string();
        assert!(cause.contains("qpq-admin restore"), "{cause}");
    }
    let account = store.stores().accounts.by_identity(&key(1)).await.expect("read");
    assert!(account.is_some(), "calls that do not meet the damage work");
    store.close().await;
    let error = refused(directory.path()).await;
    assert!(matches!(error, OpenError::Corrupt { .. }), "the next start refuses it: {error}");
}

/// The database is from before skeletons, and has two accounts with the same skeleton.
#[tokio::test]
async fn accounts_from_before_skeletons_keep_their_names_and_reserve_their_skeletons() {
    let directory = tempfile::tempdir().expect("a directory");
    let new = |name: &str, key: u8| NewAccount {
        username: Username::parse(name).expect("a username"),
        identity: IdentityKey::new([key; 32]),
        opaque_record: vec![key; 192],
        admission: Admission::Open,
        now: UnixMillis(1),
    };
    let store = open(directory.path()).await;
    for (name, key) in [("alice", 1), ("zoe", 2)] {
        store.stores().accounts.register(new(name, key)).await.expect("register");
    }
    store.close().await;
    sql(
        directory.path(),
        "UPDATE account SET skeleton = NULL, lookalike = 0;
         INSERT INTO account (username, identity, opaque_record, created_at)
              VALUES ('a1ice', zeroblob(32), zeroblob(192), 1)",
    )
    .await;

    let store = open(directory.path()).await;
    let accounts = store.stores().accounts;
    for name in ["alice", "a1ice", "zoe"] {
        let username = Username::parse(name).expect("a username");
        assert!(accounts.credentials(&username).await.expect("read").is_some(), "{name}");
    }
    for name in ["\u{430}lice", "z\u{43e}e", "a\u{217c}ice"] {
        let registered = accounts.register(new(name, 9)).await.expect("register");
        assert_eq!(registered, Registration::UsernameTaken, "{name}");
    }
    let registered = accounts.register(new("carol", 9)).await.expect("register");
    assert!(matches!(registered, Registration::Registered(_)), "{registered:?}");
    store.close().await;
}
