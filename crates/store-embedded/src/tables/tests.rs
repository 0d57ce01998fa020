//! Checks that the descriptions agree with the schema and with the transfer, and name the account
//! of each row.

use std::collections::BTreeSet;

use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};

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
            let is_local = matches!(column.role, Role::Local | Role::LocalAccount);
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
            "blob",
            "blob_trash",
            "payload",
            "heartbeat",
            "store",
            "clock"
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
