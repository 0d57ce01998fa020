//! Confusable usernames in a cluster with edges of the previous release, which insert accounts
//! without a skeleton.

use qpq_domain::StoreLimits;
use qpq_ports::{Registration, Stores};
use qpq_store_cluster::Config;
use sqlx::{Connection as _, PgConnection};

use crate::{
    backend::{Servers, edge},
    people::new_account,
};

/// Inserts accounts named $1 and a number from $2 to $3, as an edge of the previous release does.
/// With the prefixes `x1` and `xl`, two names have the same skeleton.
const INSERT: &str = "
    WITH new AS (
        INSERT INTO account (username, identity, opaque_record, created_at)
        SELECT $1 || n, sha256(($1 || n)::bytea), sha256(''), 1
          FROM generate_series($2, $3) AS s (n)
        RETURNING id)
    INSERT INTO inbox (id) SELECT id FROM new";

async fn insert(config: &Config, prefix: &str, from: i32, to: i32) {
    let mut connection = PgConnection::connect(&config.postgres.url).await.expect("Postgres");
    let query = sqlx::query(INSERT).bind(prefix).bind(from).bind(to);
    query.execute(&mut connection).await.expect("inserted");
}

/// Counts the accounts that match a condition.
async fn count(config: &Config, condition: &'static str) -> i64 {
    let mut connection = PgConnection::connect(&config.postgres.url).await.expect("Postgres");
    let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM account WHERE {condition}"));
    sqlx::query_scalar(sql).fetch_one(&mut connection).await.expect("counted")
}

async fn register(stores: &Stores, name: &str, key: u8) -> Registration {
    stores.accounts.register(new_account(name, key)).await.expect("register")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_from_edges_without_the_rule_stay_and_guard_their_skeletons() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    assert!(matches!(register(&a, "al0", 1).await, Registration::Registered(_)));
    // An edge of the previous release accepts `a10`, which looks like `al0`.
    insert(&config, "a1", 0, 0).await;
    insert(&config, "zoe", 1, 2).await;
    assert_eq!(register(&a, "\u{430}10", 10).await, Registration::UsernameTaken);
    assert_eq!(register(&b, "zoel", 11).await, Registration::UsernameTaken);
    assert!(matches!(register(&b, "carol", 12).await, Registration::Registered(_)));
    for name in ["al0", "a10", "zoe1", "zoe2", "carol"] {
        let username = new_account(name, 0).username;
        assert!(b.accounts.credentials(&username).await.expect("read").is_some(), "{name}");
    }
    assert_eq!(count(&config, "lookalike").await, 1);
    one.close().await;
    two.close().await;
}

/// More accounts than fit one batch, half of them with the skeleton of another, and two edges that
/// start at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_starting_edge_computes_every_skeleton_that_is_missing() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    insert(&config, "x1", 1_000, 2_199).await;
    insert(&config, "xl", 1_000, 2_199).await;
    assert_eq!(count(&config, "skeleton IS NULL").await, 2_400);
    let (one, two) = tokio::join!(edge(&config), edge(&config));
    assert_eq!(count(&config, "skeleton IS NULL").await, 0);
    assert_eq!(count(&config, "lookalike").await, 1_200);
    assert_eq!(count(&config, "lookalike AND username LIKE 'xl%'").await, 1_200);
    assert_eq!(register(&one.stores(), "x\u{217c}2000", 1).await, Registration::UsernameTaken);
    one.close().await;
    two.close().await;
}
