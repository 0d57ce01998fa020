//! The data of a deleted account in the files of the data directory, and an erasure that is killed.

use std::{fs, path::Path};

use qpq_domain::{AccountId, StoreLimits};
use qpq_ports::conformance::deletion::{Populated, after_all_calls};
use qpq_store_embedded::{DATABASE_FILE, EmbeddedStore};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Row as _, SqliteConnection, ValueRef as _,
    sqlite::SqliteConnectOptions,
};

use crate::{child::Child, ops::START};

async fn open(path: &Path) -> EmbeddedStore {
    let store = EmbeddedStore::open(path, StoreLimits::default()).await;
    store.unwrap_or_else(|error| panic!("{error}"))
}

/// Returns whether `bytes` contain `wanted`.
fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// The values that belong to an account, with their names: its keys as bytes and in hexadecimal
/// digits, and its username.
fn secrets(account: &Populated) -> Vec<(String, Vec<u8>)> {
    let mut secrets = vec![("username".to_owned(), account.username.clone().into_bytes())];
    let keys = account.device_keys.iter().map(|key| ("device key", key));
    for (name, key) in keys.chain([("identity key", account.identity.as_bytes())]) {
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        secrets.push((name.to_owned(), key.to_vec()));
        secrets.push((format!("{name} in hex"), hex.to_uppercase().into_bytes()));
        secrets.push((format!("{name} in hex"), hex.into_bytes()));
    }
    secrets
}

/// Returns the files of the directory and of its subdirectories that contain a value of the
/// account.
fn found_in_files(directory: &Path, account: &Populated) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(found_in_files(&path, account));
            continue;
        }
        let bytes = fs::read(&path).expect("a file");
        for (name, secret) in secrets(account) {
            if contains(&bytes, &secret) {
                found.push(format!("{name} in {}", path.display()));
            }
        }
    }
    found
}

async fn connect(directory: &Path) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(directory.join(DATABASE_FILE))
        .read_only(true)
        .connect()
        .await
        .expect("connected")
}

/// Returns the columns of all tables that have a value of the account.
async fn found_in_tables(directory: &Path, account: &Populated) -> Vec<String> {
    let mut connection = connect(directory).await;
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT name FROM sqlite_schema WHERE type = 'table'")
            .fetch_all(&mut connection)
            .await
            .expect("read");
    assert!(tables.len() > 15, "{tables:?}");
    let mut found = Vec::new();
    for table in tables {
        let select = AssertSqlSafe(format!("SELECT * FROM {table}"));
        for row in sqlx::query(select).fetch_all(&mut connection).await.expect("read") {
            for column in 0..row.len() {
                let value = row.try_get_raw(column).expect("a value");
                if value.is_null() {
                    continue;
                }
                let bytes: Vec<u8> = row.try_get_unchecked(column).unwrap_or_default();
                for (name, secret) in secrets(account) {
                    if contains(&bytes, &secret) {
                        found.push(format!("{name} in {table}"));
                    }
                }
            }
        }
    }
    // Columns that have numbers of accounts.
    for (table, column) in [
        ("account", "id"),
        ("session", "account"),
        ("inbox", "id"),
        ("message", "inbox"),
        ("recent_id", "inbox"),
        ("key_package", "owner"),
        ("key_package_given", "owner"),
        ("hybrid_key", "owner"),
        ("device", "account"),
        ("device_done", "inbox"),
        ("device_key", "account"),
        ("group_member", "account"),
        ("group_commit", "account"),
        ("erasure", "account"),
        ("recovery_bundle", "account"),
        ("ban", "account"),
        ("group_ban", "account"),
        ("report", "reporter"),
        ("block", "account"),
        ("blob_ref", "account"),
        ("upload", "account"),
        ("blob_quota", "account"),
    ] {
        let count = format!("SELECT count(*) FROM {table} WHERE {column} = ?1");
        let rows: i64 = sqlx::query_scalar(AssertSqlSafe(count))
            .bind(account.account.0)
            .fetch_one(&mut connection)
            .await
            .expect("read");
        if rows > 0 {
            found.push(format!("{rows} rows in {table}"));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_an_erased_account_is_left_in_any_table_or_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path()).await;
    let stores = store.stores();
    let account = Populated::register(&stores).await;
    let tables = found_in_tables(directory.path(), &account).await;
    assert!(tables.len() > 30, "the search finds what is there: {tables:?}");
    assert!(!found_in_files(directory.path(), &account).is_empty());
    account.delete(&stores).await;
    Populated::erase(&stores).await;
    assert_eq!(found_in_tables(directory.path(), &account).await, [""; 0]);
    assert_eq!(found_in_files(directory.path(), &account), [""; 0], "while the server runs");
    drop(stores);
    store.close().await;
    assert_eq!(found_in_files(directory.path(), &account), [""; 0], "after its end");
}

#[test]
fn an_erasure_whose_process_is_killed_between_batches_continues_to_its_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut child = Child::spawn();
    child.open(directory.path(), StoreLimits::default()).expect("an empty directory");
    let number = child.populate();
    child.kill();
    let account = Populated::with_number(AccountId(number));
    let mut now = START;
    let mut rounds = 0;
    loop {
        let mut child = Child::spawn();
        child.open(directory.path(), StoreLimits::default()).expect("what a killed process left");
        let progress = child.erase(now, 1 + rounds % 3);
        // Killed during the next batch, or after the last one.
        child.kill();
        rounds += 1;
        match progress.as_str() {
            "more" => {}
            "waiting" => now = after_all_calls(),
            _ => break,
        }
        assert!(rounds < 200, "the erasure makes progress");
    }
    assert!(rounds > 5, "{rounds}");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let store = open(directory.path()).await;
        Populated::erase(&store.stores()).await;
        store.close().await;
        assert_eq!(found_in_tables(directory.path(), &account).await, [""; 0]);
        assert_eq!(found_in_files(directory.path(), &account), [""; 0]);
    });
}
