//! The deletion of an account on one edge, as other edges see it, and the search for its data in
//! Postgres and Redis after the erasure.

use std::sync::Arc;

use qpq_domain::{StoreLimits, TokenHash};
use qpq_ports::{
    Deletion, Erasing, SessionCreation,
    conformance::deletion::{Populated, after_all_calls, run_job},
};
use qpq_store_cluster::Config;
use qpq_test_services::resp::Reply;

use crate::{
    backend::{Process, Servers, edge, eventually},
    people::{NOW, open, person, token},
};

/// The columns that have numbers of accounts.
const NUMBERS: [(&str, &str); 22] = [
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
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The values that belong to an account: its keys and its username, as bytes.
fn secrets(account: &Populated) -> Vec<Vec<u8>> {
    let keys = account.device_keys.iter().chain([account.identity.as_bytes()]);
    let keys = keys.map(|key| key.to_vec());
    keys.chain([account.username.clone().into_bytes()]).collect()
}

/// Returns whether `bytes` contain `wanted`.
fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Returns the tables of Postgres that have a value of the account.
async fn found_in_postgres(servers: &Servers, config: &Config, account: &Populated) -> Vec<String> {
    let sql = async |sql: &str| {
        let rows = servers.postgres.sql_in(&config.namespace, sql).await;
        rows.expect("a query").trim().to_owned()
    };
    let tables = "SELECT c.relname FROM pg_class c WHERE c.relkind IN ('r', 'p')
                     AND NOT c.relispartition AND c.relnamespace = 'public'::regnamespace";
    let tables = sql(tables).await;
    assert!(tables.lines().count() > 15, "{tables}");
    let mut found = Vec::new();
    for table in tables.lines().map(str::trim) {
        // As text, bytes are hexadecimal digits.
        let rows = sql(&format!("SELECT t::text FROM {table} t")).await;
        for secret in secrets(account) {
            let is_text = String::from_utf8(secret.clone()).is_ok_and(|text| rows.contains(&text));
            if is_text || rows.contains(&hex(&secret)) {
                found.push(format!("{} in {table}", hex(&secret)));
            }
        }
    }
    for (table, column) in NUMBERS {
        let count = format!("SELECT count(*) FROM {table} WHERE {column} = {}", account.account.0);
        let rows = sql(&count).await;
        if rows != "0" {
            found.push(format!("{rows} rows in {table}"));
        }
    }
    found
}

fn collect(reply: &Reply, into: &mut Vec<u8>) {
    match reply {
        Reply::Bulk(bytes) => into.extend(bytes),
        Reply::Status(text) => into.extend(text.as_bytes()),
        Reply::Array(replies) => replies.iter().for_each(|reply| collect(reply, into)),
        Reply::Integer(_) | Reply::Nil => {}
    }
    into.push(0);
}

/// Returns the keys of Redis whose name or value has a value of the account.
async fn found_in_redis(servers: &Servers, config: &Config, account: &Populated) -> Vec<String> {
    let mut redis = servers.redis.connect().await.expect("connected");
    let pattern = format!("{}:*", config.namespace);
    let keys = redis.command(["KEYS", pattern.as_str()]).await.expect("KEYS");
    let mut found = Vec::new();
    for key in keys.array().expect("a list") {
        let key = key.text().expect("text");
        let kind = redis.command(["TYPE", key]).await.expect("TYPE");
        let read: &[&str] = match kind.text().expect("a type") {
            "string" => &["GET", key],
            "hash" => &["HGETALL", key],
            "zset" => &["ZRANGE", key, "0", "-1"],
            "set" => &["SMEMBERS", key],
            "none" => continue,
            other => panic!("a key of the type {other}"),
        };
        let mut content = key.as_bytes().to_vec();
        collect(&redis.command(read).await.expect("read"), &mut content);
        for secret in secrets(account) {
            if contains(&content, &secret) || contains(&content, hex(&secret).as_bytes()) {
                found.push(key.to_owned());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_an_erased_account_is_left_in_postgres_or_redis() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    servers.mark(&config).await;
    let store = edge(&config).await;
    let stores = store.stores();
    let account = Populated::register(&stores).await;
    let found = found_in_postgres(&servers, &config, &account).await;
    assert!(found.len() > 20, "the search finds what is there: {found:?}");
    assert!(!found_in_redis(&servers, &config, &account).await.is_empty());
    account.delete(&stores).await;
    Populated::erase(&stores).await;
    assert_eq!(found_in_postgres(&servers, &config, &account).await, [""; 0]);
    assert_eq!(found_in_redis(&servers, &config, &account).await, [""; 0]);
    let payloads = "SELECT count(*) FROM payload p
                     WHERE p.refs <> (SELECT count(*) FROM message m WHERE m.payload_id = p.id)";
    let wrong = servers.postgres.sql_in(&config.namespace, payloads).await.expect("a query");
    assert_eq!(wrong.trim(), "0", "shared payloads are counted down");
    let jobs = servers.postgres.sql_in(&config.namespace, "SELECT count(*) FROM job").await;
    assert_eq!(jobs.expect("a query").trim(), "0");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_on_one_edge_takes_effect_on_the_others() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let (a, b) = (edge(&config).await, edge(&config).await);
    let (one, other) = (a.stores(), b.stores());
    for n in 1..=10 {
        let alice = person(&one, n).await;
        let session = open(&one, n, alice).await;
        let found = other.sessions.find(&token(n)).await.expect("find");
        assert_eq!(found.as_ref(), Some(&session), "the other edge has a copy");
        let deleted = one.accounts.delete(alice.account, NOW).await.expect("delete");
        assert!(matches!(deleted, Deletion::Deleted(_)));
        assert_eq!(other.sessions.confirm(&token(n)).await.expect("confirm"), None);
        assert_eq!(other.accounts.by_identity(&alice.identity).await.expect("read"), None);
        eventually("the copy of the session to be dropped", async || {
            other.sessions.find(&token(n)).await.expect("find").is_none()
        })
        .await;
        let late = qpq_ports::NewSession { token: TokenHash::new([n + 100; 32]), session };
        let created = other.sessions.create(late).await.expect("create");
        assert_eq!(created, SessionCreation::NoAccount);
        let again = other.accounts.delete(alice.account, NOW).await.expect("delete");
        assert_eq!(again, Deletion::NotFound);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_of_a_killed_edge_continues_on_another() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    servers.mark(&config).await;
    let first = Process::start(&config).await;
    let account = Populated::register(&first.store.stores()).await;
    account.delete(&first.store.stores()).await;
    first.crash().await;
    let mut now = NOW;
    for round in 0..100 {
        let process = Process::start(&config).await;
        let stores = process.store.stores();
        // The edge is killed while the claim of the job is valid. Its lease ends after a minute.
        now = now.plus(std::time::Duration::from_secs(61));
        let (batches, mut left) = (1 + round % 3, 1 + round % 3);
        let stopped = Arc::new(tokio::sync::Notify::new());
        let stop = Arc::clone(&stopped);
        let running = tokio::spawn(async move {
            let mut last = None;
            let ran = run_job(&stores, now, |progress| {
                last = Some(progress);
                left -= 1;
                if left == 0 {
                    stop.notify_one();
                }
            })
            .await;
            (ran, last)
        });
        let ended = tokio::select! {
            ended = running => Some(ended.expect("no panic")),
            () = stopped.notified() => None,
        };
        process.crash().await;
        match ended {
            Some((true, Some(Erasing::WaitFor(_)))) => now = now.max(after_all_calls()),
            Some((true, Some(Erasing::Done)) | (false, _)) => break,
            _ => {}
        }
        assert!(round < 99, "the erasure makes progress, {batches} batches at a time");
    }
    let last = edge(&config).await;
    Populated::erase(&last.stores()).await;
    assert_eq!(found_in_postgres(&servers, &config, &account).await, [""; 0]);
}
