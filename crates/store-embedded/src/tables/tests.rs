//! Checks that the descriptions agree with the schema and with the transfer, and name the account
//! of each row.

use std::collections::BTreeSet;

use sqlx::{AssertSqlSafe, ConnectOptions as _, sqlite::SqliteConnectOptions};

use super::*;

#[tokio::test]
async fn every_table_and_column_of_the_schema_is_described() {
    let mut connection = SqliteConnectOptions::new().connect().await.expect("in memory");
    sqlx::migrate!().run(&mut connection).await.expect("schema");
    let schema: Vec<(String, String)> = sqlx::query_as(
        "SELECT t.name, c.name FROM sqlite_schema t JOIN pragma_table_info(t.name) c
          WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
            AND t.name <> '_sqlx_migrations'",
    )
    .fetch_all(&mut connection)
    .await
    .expect("read");
    let schema: BTreeSet<_> = schema.into_iter().collect();
    let described: BTreeSet<_> = TABLES
        .iter()
        .flat_map(|table| {
            table.columns.iter().map(|column| (table.name.to_owned(), column.name.to_owned()))
        })
        .collect();
    assert_eq!(schema, described);
}

#[test]
fn moved_tables_have_the_columns_and_keys_of_the_transfer() {
    for table in Table::ALL {
        let description = TableDescription::of(table);
        assert_eq!(description.name, table.name());
        assert_eq!(description.column_list(), table.column_list(), "{}", table.name());
        assert_eq!(description.key_list(), table.key_list(), "{}", table.name());
    }
    let moved = TABLES.iter().filter(|description| description.moved().is_some());
    assert_eq!(moved.count(), Table::ALL.len(), "each is moved once");
}

#[test]
fn only_tables_that_are_not_moved_have_local_columns() {
    for table in TABLES {
        for column in table.columns {
            let is_local = column.role == Role::Local;
            assert_eq!(is_local, table.moved().is_none(), "{}.{}", table.name, column.name);
        }
    }
}

#[test]
fn canonical_rows_have_identities_positions_and_hashes() {
    let sql = |table| TableDescription::of(table).canonical_rows().sql;
    assert_eq!(
        sql(Table::Account),
        "SELECT t.username, t.identity, t.opaque_record, t.created_at FROM account t"
    );
    assert_eq!(
        sql(Table::HybridKey),
        "SELECT a.identity, t.key, t.signature \
         FROM hybrid_key t JOIN account a ON a.id = t.owner"
    );
    assert_eq!(
        sql(Table::KeyPackage),
        "SELECT a.identity, row_number() OVER (PARTITION BY t.owner ORDER BY t.id), \
         t.fingerprint, t.last_resort, t.not_after, t.bytes, t.not_before, t.device \
         FROM key_package t JOIN account a ON a.id = t.owner"
    );
    assert_eq!(
        sql(Table::GroupMember),
        "SELECT row_number() OVER (PARTITION BY t.group_id ORDER BY t.id), t.group_id, \
         a.identity, t.role, t.joined_at \
         FROM group_member t JOIN account a ON a.id = t.account"
    );
    assert_eq!(
        sql(Table::Job),
        "SELECT t.kind, t.payload, t.run_at, t.attempts, t.died_at, t.last_error \
         FROM job t WHERE t.key IS NULL"
    );
    let messages = TableDescription::of(Table::Message).canonical_rows();
    assert_eq!(messages.hashed, [8], "the payload");
}

/// Returns the column that names the account of a row; `None` if no row belongs to an account.
fn owner(table: &TableDescription) -> Option<&'static str> {
    let names_account =
        |column: &&Column| matches!(column.role, Role::Account | Role::AccountInOrder(_));
    if table.name == "account" {
        return Some("id");
    }
    table.columns.iter().find(names_account).map(|column| column.name)
}

#[test]
fn every_table_names_the_account_of_its_rows_or_belongs_to_the_server() {
    let of_server: Vec<_> =
        TABLES.iter().filter(|table| owner(table).is_none()).map(|table| table.name).collect();
    // A group belongs to its members, a payload to the messages that refer to it.
    assert_eq!(of_server, ["mls_group", "job", "invite", "payload", "heartbeat", "store", "clock"]);
}

/// Returns the statement that stores a row of the account ?1.
fn row_of(table: &str) -> String {
    let values = match table {
        "account" => {
            "(id, username, identity, opaque_record, created_at)
                      VALUES (?1, 'user' || ?1, KEY, x'', 0)"
        }
        "session" => {
            "(token, account, authenticated_at, last_used_at, expires_at)
                      VALUES (KEY, ?1, 0, 0, 0)"
        }
        "inbox" => "(id) VALUES (?1)",
        "message" => {
            "(inbox, seq, expires_at, enqueued_at, size, channel, sender, payload_sha256,
                       payload) VALUES (?1, 1, 0, 0, 0, x'', x'', x'', x'')"
        }
        "recent_id" => "VALUES (?1, x'', x'', 1, x'', x'', 0, 0)",
        "key_package" => {
            "(owner, fingerprint, last_resort, not_after, bytes)
                          VALUES (?1, KEY, 0, 0, x'')"
        }
        "key_package_given" => "VALUES (?1, KEY, 0)",
        "hybrid_key" => "(owner, key) VALUES (?1, x'')",
        "device" => {
            "(account, device, name, registered_at, last_seen_at, upto)
                     VALUES (?1, ID, '', 0, 0, 0)"
        }
        "device_done" => "VALUES (?1, 1, ID)",
        "device_key" => "VALUES (KEY, ?1, ID)",
        "group_member" => "(group_id, account, role, joined_at) VALUES (zeroblob(16), ?1, 0, 0)",
        "group_commit" => "VALUES (zeroblob(16), ?1, ID, 0, 0, x'')",
        table => panic!("a row of the table {table} is missing here"),
    };
    let values = values.replace("KEY", "CAST(printf('%032d', ?1) AS BLOB)");
    format!("INSERT INTO {table} {}", values.replace("ID", "CAST(printf('%016d', ?1) AS BLOB)"))
}

#[tokio::test]
async fn the_rows_of_one_account_are_erased_by_the_columns_that_name_it() {
    let mut connection =
        SqliteConnectOptions::new().foreign_keys(true).connect().await.expect("in memory");
    sqlx::migrate!().run(&mut connection).await.expect("schema");
    let group = "INSERT INTO mls_group VALUES (zeroblob(16), NULL, '', '', x'', 0, 0, 0, NULL)";
    sqlx::query(group).execute(&mut connection).await.expect("a group");
    let owned: Vec<_> =
        TABLES.iter().filter_map(|table| Some((table.name, owner(table)?))).collect();
    for (table, _) in &owned {
        for account in [1, 2] {
            let row = sqlx::query(AssertSqlSafe(row_of(table))).bind(account);
            row.execute(&mut connection).await.unwrap_or_else(|error| panic!("{table}: {error}"));
        }
    }
    // A table is described after the tables that it refers to.
    for (table, owner) in owned.iter().rev() {
        let erase = format!("DELETE FROM {table} WHERE {owner} = 1");
        let erased = sqlx::query(AssertSqlSafe(erase)).execute(&mut connection).await;
        erased.unwrap_or_else(|error| panic!("{table}: {error}"));
    }
    for (table, owner) in owned {
        let left = format!("SELECT group_concat({owner}) FROM {table}");
        let left: Option<String> =
            sqlx::query_scalar(AssertSqlSafe(left)).fetch_one(&mut connection).await.expect("read");
        assert_eq!(left.as_deref(), Some("2"), "{table}");
    }
}
