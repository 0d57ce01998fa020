//! The descriptions agree with the schema and with the transfer, and name the account of each row.

use std::collections::BTreeSet;

use qpq_test_services::Postgres;
use sqlx::{Connection as _, PgConnection};

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
    let names_account = |column: &&Column| {
        matches!(column.role, Role::Account | Role::AccountInOrder(_) | Role::LocalAccount)
    };
    if table.name == "account" {
        return Some("id");
    }
    table.columns.iter().find(names_account).map(|column| column.name)
}

#[test]
fn every_table_names_the_account_of_its_rows_or_belongs_to_the_server() {
    let of_server: Vec<_> =
        TABLES.iter().filter(|table| owner(table).is_none()).map(|table| table.name).collect();
    // A group belongs to its members, a payload to the messages that refer to it, a blob to its
    // references. The audit trail outlives accounts. A tombstone shows no account.
    assert_eq!(
        of_server,
        [
            "mls_group",
            "audit",
            "job",
            "invite",
            "tombstone",
            "payload",
            "blob",
            "blob_chunk",
            "blob_trash",
            "cluster",
            "heartbeat",
            "store"
        ]
    );
}

#[test]
fn every_table_says_how_the_rows_of_an_account_are_erased() {
    for table in TABLES {
        assert!(!table.erased.is_empty(), "{}", table.name);
        let Some(owner) = owner(table) else { continue };
        let erases = |erased: &Erased| match *erased {
            Erased::RowsOf(column)
            | Erased::MessagesOf(column)
            | Erased::BlobsOf(column)
            | Erased::Keys { account: column, .. } => column == owner,
            Erased::Memberships | Erased::Last => true,
            _ => false,
        };
        assert!(table.erased.iter().any(erases), "{}.{owner}", table.name);
        let is_rest = |erased: &Erased| matches!(erased, Erased::Nothing | Erased::Tombstones);
        assert!(!table.erased.iter().any(is_rest), "{}", table.name);
    }
    let erased_last: Vec<_> = TABLES
        .iter()
        .filter(|table| table.erased.contains(&Erased::Last))
        .map(|table| table.name)
        .collect();
    assert_eq!(erased_last, ["account", "erasure"], "the last step deletes from these");
}
