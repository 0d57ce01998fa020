//! The description of every table of the schema.
//!
//! The tables and statements by which a single node is moved in, and the canonical rows that verify
//! the transfer, are generated from this description. A test compares it with the schema, so a new
//! table or column needs an entry here and a migration.

use std::fmt::Write as _;

use qpq_ports::transfer::{Column as TransferredColumn, ColumnType, Table};

/// A table and all of its columns.
#[derive(Debug)]
pub(crate) struct TableDescription {
    name: &'static str,
    content: Content,
    columns: &'static [Column],
}

/// The source of the rows of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// A transfer moves the rows, in the order of the key.
    Transferred(Table),
    /// The rows describe this database alone.
    Local,
}

#[derive(Clone, Copy, Debug)]
struct Column {
    name: &'static str,
    role: Role,
}

/// The part of a column in a transfer and in canonical rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Moved, and part of the canonical row.
    Value,
    /// A value that is moved. The canonical row has the SHA-256 of the value.
    LargeValue,
    /// A boolean here, 0 or 1 in the other store and in the canonical row. See
    /// [`Value`](Self::Value).
    Flag,
    /// A number with a smaller type here. See [`Value`](Self::Value).
    SmallNumber,
    /// The key of a table without accounts, by which canonical rows are found. See
    /// [`Value`](Self::Value).
    Key,
    /// The number of an account. The account gets another number here, and the canonical row has
    /// its identity key instead.
    Account,
    /// The number of an account, in a table where the named column orders the rows of an account.
    /// The canonical row has the identity key and the position in that order. See
    /// [`Account`](Self::Account).
    AccountInOrder(&'static str),
    /// A number that this store assigns, in the order of the numbers of the other store. Not in
    /// canonical rows.
    RowNumber,
    /// A number that orders the rows with the same value of the named column. The canonical row has
    /// the position in that order. See [`RowNumber`](Self::RowNumber).
    OrderWithin(&'static str),
    /// A number in a table without accounts. Canonical rows are found by the new number. See
    /// [`RowNumber`](Self::RowNumber).
    Renumbered,
    /// A key that is unique here. A row whose key exists already is not moved, so rows with a key
    /// are not canonical.
    UniqueKey,
    /// Set to this SQL expression in moved rows. Not in canonical rows.
    Set(&'static str),
    /// Neither moved nor in canonical rows: a value that is computed later from other columns, or a
    /// column of a table that is not moved.
    Local,
}

const fn column(name: &'static str, role: Role) -> Column {
    Column { name, role }
}

const fn value(name: &'static str) -> Column {
    column(name, Role::Value)
}

const fn local(name: &'static str) -> Column {
    column(name, Role::Local)
}

/// All tables of the schema, except that of the migrations and the partitions of `message`.
/// Accounts come first, since the other rows are moved to their new numbers.
static TABLES: &[TableDescription] = &[
    TableDescription {
        name: "account",
        content: Content::Transferred(Table::Account),
        columns: &[
            column("id", Role::RowNumber),
            value("username"),
            value("identity"),
            value("opaque_record"),
            value("created_at"),
            // Computed after the transfer: an account whose name looks like that of one of the
            // cluster's accounts keeps its name.
            local("skeleton"),
            local("lookalike"),
        ],
    },
    TableDescription {
        name: "session",
        content: Content::Transferred(Table::Session),
        columns: &[
            value("token"),
            column("account", Role::Account),
            value("device"),
            value("authenticated_at"),
            value("last_used_at"),
            value("expires_at"),
        ],
    },
    TableDescription {
        name: "inbox",
        content: Content::Transferred(Table::Inbox),
        columns: &[
            column("id", Role::Account),
            value("last_seq"),
            // More than any inbox of a cluster reaches, see `import`.
            column("removals", Role::Set("1::bigint << 40")),
            value("messages"),
            value("bytes"),
            value("next_expiry"),
            // Counted after the transfer.
            local("devices"),
        ],
    },
    TableDescription {
        name: "message",
        content: Content::Transferred(Table::Message),
        columns: &[
            column("inbox", Role::Account),
            value("seq"),
            value("expires_at"),
            value("enqueued_at"),
            value("channel"),
            value("sender"),
            value("message_id"),
            value("payload_sha256"),
            // Hashed again, because a transfer does not rely on the stored hash.
            column("payload", Role::LargeValue),
            // Moved messages have their payloads in their rows. The canonical rows are read before
            // any other message exists in these inboxes.
            local("payload_id"),
            local("size"),
        ],
    },
    TableDescription {
        name: "recent_id",
        content: Content::Transferred(Table::RecentId),
        columns: &[
            column("inbox", Role::Account),
            value("sender"),
            value("message_id"),
            value("seq"),
            value("channel"),
            value("payload_sha256"),
            value("enqueued_at"),
            value("forget_at"),
        ],
    },
    TableDescription {
        name: "key_package",
        content: Content::Transferred(Table::KeyPackage),
        columns: &[
            column("id", Role::RowNumber),
            // KeyPackages are taken in the order of their upload.
            column("owner", Role::AccountInOrder("id")),
            value("fingerprint"),
            column("last_resort", Role::Flag),
            value("not_after"),
            value("bytes"),
            value("not_before"),
            value("device"),
        ],
    },
    TableDescription {
        name: "key_package_given",
        content: Content::Transferred(Table::KeyPackageTaken),
        columns: &[column("owner", Role::Account), value("fingerprint"), value("not_after")],
    },
    TableDescription {
        name: "hybrid_key",
        content: Content::Transferred(Table::HybridKey),
        columns: &[column("owner", Role::Account), value("key"), value("signature")],
    },
    TableDescription {
        name: "device",
        content: Content::Transferred(Table::Device),
        columns: &[
            column("id", Role::RowNumber),
            // Devices have the order of their registration.
            column("account", Role::AccountInOrder("id")),
            value("device"),
            value("name"),
            value("key"),
            value("proof"),
            value("registered_at"),
            value("last_seen_at"),
            value("upto"),
            // The same value as the removals of an inbox.
            column("removals", Role::Set("1::bigint << 40")),
            column("position_lost", Role::Flag),
        ],
    },
    TableDescription {
        name: "device_done",
        content: Content::Transferred(Table::DeviceCompleted),
        columns: &[column("inbox", Role::Account), value("seq"), value("device")],
    },
    TableDescription {
        name: "device_key",
        content: Content::Transferred(Table::DeviceKey),
        columns: &[value("key"), column("account", Role::Account), value("device")],
    },
    TableDescription {
        name: "mls_group",
        content: Content::Transferred(Table::Group),
        columns: &[
            column("id", Role::Key),
            value("pair"),
            value("name"),
            value("description"),
            value("settings"),
            value("version"),
            value("epoch"),
            column("group_info", Role::LargeValue),
            value("created_at"),
        ],
    },
    TableDescription {
        name: "group_member",
        content: Content::Transferred(Table::GroupMember),
        columns: &[
            // Members have the order in which they joined.
            column("id", Role::OrderWithin("group_id")),
            value("group_id"),
            column("account", Role::Account),
            column("role", Role::SmallNumber),
            value("joined_at"),
        ],
    },
    TableDescription {
        name: "group_commit",
        content: Content::Transferred(Table::GroupCommit),
        columns: &[
            value("group_id"),
            column("account", Role::Account),
            value("message_id"),
            value("epoch"),
            value("committed_at"),
            value("outcome"),
        ],
    },
    TableDescription {
        name: "job",
        content: Content::Transferred(Table::Job),
        columns: &[
            column("id", Role::Renumbered),
            value("kind"),
            column("key", Role::UniqueKey),
            value("payload"),
            value("run_at"),
            // No worker of the single node is left, so every claim is released.
            local("claim"),
            local("again_at"),
            value("attempts"),
            value("died_at"),
            value("last_error"),
        ],
    },
    TableDescription {
        name: "invite",
        content: Content::Transferred(Table::Invite),
        columns: &[
            column("code", Role::Key),
            value("uses"),
            value("uses_left"),
            value("username"),
            value("note"),
            value("created_at"),
            value("expires_at"),
        ],
    },
    TableDescription {
        name: "payload",
        content: Content::Local,
        columns: &[local("id"), local("refs"), local("bytes")],
    },
    TableDescription {
        name: "cluster",
        content: Content::Local,
        columns: &[local("singleton"), local("opaque_setup")],
    },
    TableDescription {
        name: "heartbeat",
        content: Content::Local,
        columns: &[local("singleton"), local("beats")],
    },
    TableDescription {
        name: "store",
        content: Content::Local,
        columns: &[local("singleton"), local("salt")],
    },
];

impl TableDescription {
    /// Returns the descriptions of the tables that are moved, accounts first.
    pub(crate) fn moved() -> impl Iterator<Item = (Table, &'static Self)> {
        TABLES.iter().filter_map(|description| match description.content {
            Content::Transferred(table) => Some((table, description)),
            Content::Local => None,
        })
    }

    /// Returns the statement that moves the rows of `import_…` to this table.
    pub(crate) fn move_in(&self) -> String {
        let (mut names, mut values) = (Vec::new(), Vec::new());
        let (mut join, mut order, mut conflict) = (String::new(), String::new(), "");
        for Column { name, role } in self.columns {
            let value = match role {
                Role::Value | Role::LargeValue | Role::SmallNumber | Role::Key => {
                    format!("t.{name}")
                }
                Role::Renumbered => "t.moved".to_owned(),
                Role::UniqueKey => {
                    conflict = " ON CONFLICT DO NOTHING";
                    format!("t.{name}")
                }
                Role::Flag => format!("t.{name} <> 0"),
                Role::Account | Role::AccountInOrder(_) => {
                    join = format!(" JOIN import_account s ON s.id = t.{name}");
                    "s.moved".to_owned()
                }
                Role::RowNumber | Role::OrderWithin(_) => {
                    order = format!(" ORDER BY t.{name}");
                    continue;
                }
                Role::Set(expression) => (*expression).to_owned(),
                Role::Local => continue,
            };
            names.push(*name);
            values.push(value);
        }
        let (names, values, name) = (names.join(", "), values.join(", "), self.name);
        format!(
            "INSERT INTO {name} ({names}) SELECT {values} FROM import_{name} t{join}{order}{conflict}"
        )
    }

    /// Returns the statement that assigns the new numbers of rows before they are moved, if the
    /// table needs one.
    pub(crate) fn renumber(&self) -> Option<String> {
        let number = self.columns.iter().find(|column| column.role == Role::Renumbered)?.name;
        let name = self.name;
        Some(format!(
            "UPDATE import_{name} SET moved = nextval(pg_get_serial_sequence('{name}', '{number}'))"
        ))
    }

    /// Returns the query for the canonical rows of the accounts that were moved in. The exporter of
    /// the single node has the same cells in the same order.
    pub(crate) fn canonical_rows(&self) -> String {
        let (mut cells, mut filter) = (Vec::new(), String::new());
        let (mut moved, mut key) = ("import_account".to_owned(), ("moved", "id"));
        for Column { name, role } in self.columns {
            match role {
                Role::Value => cells.push(format!("t.{name}")),
                Role::LargeValue => cells.push(format!("sha256(t.{name})")),
                Role::Flag => cells.push(format!("t.{name}::int::bigint")),
                Role::SmallNumber => cells.push(format!("t.{name}::bigint")),
                Role::Key => {
                    cells.push(format!("t.{name}"));
                    (moved, key) = (format!("import_{}", self.name), (*name, *name));
                }
                Role::OrderWithin(group) => cells
                    .push(format!("row_number() OVER (PARTITION BY t.{group} ORDER BY t.{name})")),
                Role::Account => {
                    cells.push("a.identity".to_owned());
                    key = ("moved", *name);
                }
                Role::AccountInOrder(order) => {
                    key = ("moved", *name);
                    cells.push("a.identity".to_owned());
                    cells.push(format!(
                        "row_number() OVER (PARTITION BY t.{name} ORDER BY t.{order})"
                    ));
                }
                Role::Renumbered => {
                    (moved, key) = (format!("import_{}", self.name), ("moved", *name));
                }
                Role::UniqueKey => filter = format!(" WHERE t.{name} IS NULL"),
                Role::RowNumber | Role::Set(_) | Role::Local => {}
            }
        }
        let (cells, name) = (cells.join(", "), self.name);
        let (of_moved, own) = key;
        format!("SELECT {cells} FROM {name} t JOIN {moved} a ON a.{of_moved} = t.{own}{filter}")
    }
}

/// Returns the statements that create the tables `import_…`, where rows wait to be moved in. The
/// tables have the columns of the other store, and for accounts and renumbered rows a column for
/// the new number. They are not part of the schema, and exist only during a transfer.
pub(crate) fn create_import_tables() -> String {
    let mut sql = String::new();
    for (table, TableDescription { name, columns, .. }) in TableDescription::moved() {
        let _ = write!(sql, "CREATE TABLE import_{name} (");
        for TransferredColumn { name, kind } in table.columns() {
            let _ = write!(sql, "{name} {}, ", sql_type(*kind));
        }
        let is_renumbered = columns.iter().any(|column| column.role == Role::Renumbered);
        if table == Table::Account || is_renumbered {
            sql.push_str("moved bigint UNIQUE, ");
        }
        let _ = write!(sql, "PRIMARY KEY ({}));", table.key_list());
        // Ciphertext does not compress.
        for column in columns.iter().filter(|column| column.role == Role::LargeValue) {
            let _ = write!(
                sql,
                "ALTER TABLE import_{name} ALTER COLUMN {} SET STORAGE EXTERNAL;",
                column.name
            );
        }
    }
    sql
}

/// Returns the statements that drop the tables of [`create_import_tables`].
pub(crate) fn drop_import_tables() -> String {
    let drop = |(_, description): (Table, &TableDescription)| {
        format!("DROP TABLE IF EXISTS import_{};", description.name)
    };
    TableDescription::moved().map(drop).collect()
}

/// Returns the statement that collects the statistics of the tables `import_…`, for Postgres' query
/// plans.
pub(crate) fn analyze_import_tables() -> String {
    let names = TableDescription::moved().map(|(_, table)| format!("import_{}", table.name));
    format!("ANALYZE {}", names.collect::<Vec<_>>().join(", "))
}

/// Returns the type of a column of the other store.
pub(crate) const fn sql_type(kind: ColumnType) -> &'static str {
    match kind {
        ColumnType::Number => "bigint",
        ColumnType::Text => "text",
        ColumnType::Bytes => "bytea",
    }
}

#[cfg(test)]
mod tests;
