//! The descriptions agree with the schema and with the transfer, and name the account of each row.

use std::collections::BTreeSet;

use qpq_test_services::Postgres;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::*;

/// The columns of all tables but that of the migrations. Partitions are left out, since they have
/// the columns of their table.
const COLUMNS: &str = "
    SELECT c.relname::text, a.attname::text
      FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
     WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND a.attnum > 0
       AND NOT a.attisdropped AND c.relnamespace = current_schema()::regnamespace
       AND c.relname <> '_sqlx_migrations'";

#[tokio::test]
async fn every_table_and_column_of_the_schema_is_described() {
    let postgres = Postgres::start().await.expect("Postgres");
    let url = postgres.create_database("described").await.expect("a database");
    let mut connection = PgConnection::connect(&url).await.expect("connected");
    sqlx::migrate!().run(&mut connection).await.expect("the schema");
    let schema: Vec<(String, String)> =
        sqlx::query_as(COLUMNS).fetch_all(&mut connection).await.expect("read");
    let schema: BTreeSet<_> = schema.into_iter().collect();
    let described: BTreeSet<_> = TABLES
        .iter()
        .flat_map(|table| {
            let of_column = |column: &Column| (table.name.to_owned(), column.name.to_owned());
            table.columns.iter().map(of_column)
        })
        .collect();
    assert_eq!(described, schema);
    assert!(schema.len() > 40);
}

#[test]
fn every_moved_table_and_column_is_described_once() {
    let described: Vec<_> = TableDescription::moved().map(|(table, _)| table).collect();
    assert_eq!(described, Table::ALL);
    for (table, description) in TableDescription::moved() {
        assert_eq!(table.name(), description.name);
        for TransferredColumn { name, .. } in table.columns() {
            let is_here = description.columns.iter().any(|column| column.name == *name);
            // The number of a message belongs to the single node alone.
            assert!(is_here || (table, *name) == (Table::Message, "id"), "{table:?}.{name}");
        }
    }
}

#[test]
fn statements_are_generated_from_the_roles_of_the_columns() {
    let (_, packages) = TableDescription::moved()
        .find(|(table, _)| *table == Table::KeyPackage)
        .expect("described");
    assert_eq!(
        packages.move_in(),
        "INSERT INTO key_package (owner, fingerprint, last_resort, not_after, bytes, \
         not_before, device) SELECT s.moved, t.fingerprint, t.last_resort <> 0, t.not_after, \
         t.bytes, t.not_before, t.device FROM import_key_package t \
         JOIN import_account s ON s.id = t.owner ORDER BY t.id"
    );
    assert_eq!(
        packages.canonical_rows(),
        "SELECT a.identity, row_number() OVER (PARTITION BY t.owner ORDER BY t.id), \
         t.fingerprint, t.last_resort::int::bigint, t.not_after, t.bytes, t.not_before, \
         t.device FROM key_package t JOIN import_account a ON a.moved = t.owner"
    );
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
    assert_eq!(
        of_server,
        ["mls_group", "job", "invite", "payload", "cluster", "heartbeat", "store"]
    );
}

/// Returns the statement that stores a row of the account $1.
fn row_of(table: &str) -> String {
    let values = match table {
        "account" => {
            "(id, username, identity, opaque_record, created_at)
                      VALUES ($1, 'user' || $1, KEY, '', 0)"
        }
        "session" => {
            "(token, account, authenticated_at, last_used_at, expires_at)
                      VALUES (KEY, $1, 0, 0, 0)"
        }
        "inbox" => "(id) VALUES ($1)",
        "message" => {
            "(inbox, seq, expires_at, enqueued_at, channel, sender, payload_sha256,
                       payload) VALUES ($1, 1, 0, 0, '', '', '', '')"
        }
        "recent_id" => "VALUES ($1, '', '', 1, '', '', 0, 0)",
        "key_package" => {
            "(owner, fingerprint, last_resort, not_after, bytes)
                          VALUES ($1, KEY, false, 0, '')"
        }
        "key_package_given" => "VALUES ($1, KEY, 0)",
        "hybrid_key" => "(owner, key) VALUES ($1, '')",
        "device" => {
            "(account, device, name, registered_at, last_seen_at, upto)
                     VALUES ($1, ID, '', 0, 0, 0)"
        }
        "device_done" => "VALUES ($1, 1, ID)",
        "device_key" => "VALUES (KEY, $1, ID)",
        "group_member" => {
            "(group_id, account, role, joined_at)
                           SELECT id, $1, 0, 0 FROM mls_group"
        }
        "group_commit" => "SELECT id, $1, ID, 0, 0, '' FROM mls_group",
        table => panic!("a row of the table {table} is missing here"),
    };
    let values = values.replace("KEY", "decode(lpad($1::text, 64, '0'), 'hex')");
    let values = values.replace("ID", "decode(lpad($1::text, 32, '0'), 'hex')");
    format!("INSERT INTO {table} {}", values.replace("$1", "$1::bigint"))
}

#[tokio::test]
async fn the_rows_of_one_account_are_erased_by_the_columns_that_name_it() {
    let postgres = Postgres::start().await.expect("Postgres");
    let url = postgres.create_database("erased").await.expect("a database");
    let mut connection = PgConnection::connect(&url).await.expect("connected");
    sqlx::migrate!().run(&mut connection).await.expect("the schema");
    let group = "INSERT INTO mls_group VALUES (decode(lpad('', 32, '0'), 'hex'), NULL, '', '', '',
                                               0, 0, NULL, 0)";
    sqlx::query(group).execute(&mut connection).await.expect("a group");
    let owned: Vec<_> =
        TABLES.iter().filter_map(|table| Some((table.name, owner(table)?))).collect();
    for (table, _) in &owned {
        for account in [1_i64, 2] {
            let row = sqlx::query(AssertSqlSafe(row_of(table))).bind(account);
            row.execute(&mut connection).await.unwrap_or_else(|error| panic!("{table}: {error}"));
        }
    }
    // Deletes in reverse order, since a table is described after the tables that it refers to.
    for (table, owner) in owned.iter().rev() {
        let erase = format!("DELETE FROM {table} WHERE {owner} = 1");
        let erased = sqlx::query(AssertSqlSafe(erase)).execute(&mut connection).await;
        erased.unwrap_or_else(|error| panic!("{table}: {error}"));
    }
    for (table, owner) in owned {
        let left = format!("SELECT string_agg({owner}::text, ',') FROM {table}");
        let left: Option<String> =
            sqlx::query_scalar(AssertSqlSafe(left)).fetch_one(&mut connection).await.expect("read");
        assert_eq!(left.as_deref(), Some("2"), "{table}");
    }
}
