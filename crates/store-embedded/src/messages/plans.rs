//! A check of the query plans: frequent statements use indexes, sort nothing and are compiled once.

use sqlx::{AssertSqlSafe, ConnectOptions as _, Row as _, sqlite::SqliteConnectOptions};

use super::{enqueue, left_out, position, read, remove};
use crate::{
    absence, audit, bans, blobs, blocks, deletion, devices, groups, inboxes, invites, jobs, keys,
    recovery, reports,
};

#[tokio::test]
async fn frequent_statements_use_indexes_sort_nothing_and_are_compiled_once() {
    let mut connection = SqliteConnectOptions::new().connect().await.expect("in memory");
    sqlx::migrate!().run(&mut connection).await.expect("schema");
    let statements = enqueue::statements()
        .chain(left_out::statements())
        .chain(read::STATEMENTS)
        .chain(position::statements())
        .chain(remove::statements())
        .chain([inboxes::READER])
        .chain(absence::STATEMENTS)
        .chain(devices::STATEMENTS)
        .chain(keys::STATEMENTS)
        .chain(invites::STATEMENTS)
        .chain(jobs::STATEMENTS)
        .chain(groups::statements())
        .chain(deletion::statements())
        .chain(bans::STATEMENTS)
        .chain(blocks::STATEMENTS)
        .chain(reports::STATEMENTS)
        .chain(audit::STATEMENTS)
        .chain(recovery::STATEMENTS)
        .chain(blobs::STATEMENTS);
    for sql in statements {
        // SQLite plans with the value of such a parameter, and compiles the statement again for the
        // next value. The value of `LIMIT +?` is not used for the plan.
        assert!(!sql.contains("LIMIT ?"), "{sql}");
        let plan: Vec<String> = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}")))
            .fetch_all(&mut connection)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"))
            .iter()
            .map(|row| row.get("detail"))
            .collect();
        for step in &plan {
            // Complete scans of parameters: the list of an ack, the rows of an insert, the keys
            // of members, and subqueries with a limit.
            let parameters = [
                "SCAN json_each",
                "SCAN CONSTANT ROW",
                "SCAN l",
                "SCAN n",
                "SCAN 32 CONSTANT ROWS",
                "SCAN (subquery-",
            ];
            let scans = step.starts_with("SCAN")
                && !parameters.iter().any(|parameter| step.starts_with(parameter));
            // These sort the devices of one account, at most `MAX_DEVICES`.
            let may_sort = [devices::LIST, keys::DEVICES].contains(&sql);
            let sorts = step.contains("TEMP B-TREE") && !may_sort;
            assert!(!scans && !sorts, "{sql}\n{plan:#?}");
        }
        assert!(!plan.iter().any(|step| step.contains("AUTOMATIC")), "{sql}\n{plan:#?}");
    }
}
