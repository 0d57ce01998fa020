//! The descriptions agree with the schema and with the transfer.

use std::collections::BTreeSet;

use qpq_test_services::Postgres;
use sqlx::{Connection as _, PgConnection};

use super::*;

/// The columns of all tables but that of the migrations. A partition has those of its table.
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
