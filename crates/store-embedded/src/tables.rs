//! The description of every table of the schema.
//!
//! The column lists of the export and the canonical rows that verify a transfer are generated from
//! these descriptions. A test compares them with the schema, so a new table or column needs an
//! entry here.

use qpq_ports::transfer::Table;

/// A table and all of its columns.
#[derive(Debug)]
pub(crate) struct TableDescription {
    pub(crate) name: &'static str,
    content: Content,
    columns: &'static [Column],
}

/// The treatment of a table by a transfer to a cluster.
#[derive(Clone, Copy, Debug)]
enum Content {
    /// The rows are moved, in the order of the first `key` columns.
    Transferred { to: Table, key: usize },
    /// The rows describe this database alone.
    Local,
}

#[derive(Clone, Copy, Debug)]
struct Column {
    name: &'static str,
    role: Role,
}

/// The use of a column in moved rows and in canonical rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A value that is moved, and part of the canonical row.
    Value,
    /// A value that is moved. The canonical row has the SHA-256 of the value.
    LargeValue,
    /// The value of the expression, in which `t` is the row. See [`LargeValue`](Self::LargeValue).
    LargeValueOf(&'static str),
    /// The number of an account. The canonical row has the account's identity key instead, because
    /// the numbers differ from store to store.
    Account,
    /// The number of an account, for rows whose order within an account is that of the named
    /// column. The canonical row has the identity key and the position in that order. See
    /// [`Account`](Self::Account).
    AccountInOrder(&'static str),
    /// A number that only this store uses. It orders the rows that have the same value in the named
    /// column. The canonical row has the position in that order.
    OrderWithin(&'static str),
    /// A number that only this store uses. Not in canonical rows.
    RowNumber,
    /// The key of a row that the cluster may have already. Rows with a key are left out of the
    /// canonical rows.
    UniqueKey,
    /// A value that follows from other columns. Neither moved nor part of the canonical row.
    Derived,
    /// A column of a table that is not moved.
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

/// The payload of a message, which other messages may share.
const PAYLOAD: &str = "CASE WHEN t.payload_id IS NULL THEN t.payload \
                       ELSE (SELECT p.bytes FROM payload p WHERE p.id = t.payload_id) END";

/// All tables of the schema, except those of SQLite and of the migrations.
static TABLES: &[TableDescription] = &[
    TableDescription {
        name: "account",
        content: Content::Transferred { to: Table::Account, key: 1 },
        columns: &[
            column("id", Role::RowNumber),
            value("username"),
            value("identity"),
            value("opaque_record"),
            value("created_at"),
            column("skeleton", Role::Derived),
            column("lookalike", Role::Derived),
        ],
    },
    TableDescription {
        name: "session",
        content: Content::Transferred { to: Table::Session, key: 1 },
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
        content: Content::Transferred { to: Table::Inbox, key: 1 },
        columns: &[
            column("id", Role::Account),
            value("last_seq"),
            value("messages"),
            value("bytes"),
            value("next_expiry"),
            column("devices", Role::Derived),
        ],
    },
    TableDescription {
        name: "message",
        content: Content::Transferred { to: Table::Message, key: 1 },
        columns: &[
            column("id", Role::RowNumber),
            column("inbox", Role::Account),
            value("seq"),
            value("expires_at"),
            value("enqueued_at"),
            column("size", Role::Derived),
            value("channel"),
            value("sender"),
            value("message_id"),
            value("payload_sha256"),
            // Hashed again, because a transfer does not rely on the stored hash.
            column("payload", Role::LargeValueOf(PAYLOAD)),
            column("payload_id", Role::Derived),
        ],
    },
    TableDescription {
        name: "recent_id",
        content: Content::Transferred { to: Table::RecentId, key: 3 },
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
        content: Content::Transferred { to: Table::KeyPackage, key: 1 },
        columns: &[
            column("id", Role::RowNumber),
            // Packages are taken in the order of their upload.
            column("owner", Role::AccountInOrder("id")),
            value("fingerprint"),
            value("last_resort"),
            value("not_after"),
            value("bytes"),
            value("not_before"),
            value("device"),
        ],
    },
    TableDescription {
        name: "key_package_given",
        content: Content::Transferred { to: Table::KeyPackageTaken, key: 2 },
        columns: &[column("owner", Role::Account), value("fingerprint"), value("not_after")],
    },
    TableDescription {
        name: "hybrid_key",
        content: Content::Transferred { to: Table::HybridKey, key: 1 },
        columns: &[column("owner", Role::Account), value("key"), value("signature")],
    },
    TableDescription {
        name: "device",
        content: Content::Transferred { to: Table::Device, key: 1 },
        columns: &[
            column("id", Role::RowNumber),
            // Devices are listed in the order of their registration.
            column("account", Role::AccountInOrder("id")),
            value("device"),
            value("name"),
            value("key"),
            value("proof"),
            value("registered_at"),
            value("last_seen_at"),
            value("upto"),
            value("position_lost"),
        ],
    },
    TableDescription {
        name: "device_done",
        content: Content::Transferred { to: Table::DeviceCompleted, key: 3 },
        columns: &[column("inbox", Role::Account), value("seq"), value("device")],
    },
    TableDescription {
        name: "device_key",
        content: Content::Transferred { to: Table::DeviceKey, key: 1 },
        columns: &[value("key"), column("account", Role::Account), value("device")],
    },
    TableDescription {
        name: "mls_group",
        content: Content::Transferred { to: Table::Group, key: 1 },
        columns: &[
            value("id"),
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
        content: Content::Transferred { to: Table::GroupMember, key: 1 },
        columns: &[
            // The order in which members joined decides which member follows the last admin.
            column("id", Role::OrderWithin("group_id")),
            value("group_id"),
            column("account", Role::Account),
            value("role"),
            value("joined_at"),
        ],
    },
    TableDescription {
        name: "group_commit",
        content: Content::Transferred { to: Table::GroupCommit, key: 3 },
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
        content: Content::Transferred { to: Table::Job, key: 1 },
        columns: &[
            column("id", Role::RowNumber),
            value("kind"),
            column("key", Role::UniqueKey),
            value("payload"),
            value("run_at"),
            // No worker of this store is left, so every claim is released.
            column("claim", Role::Derived),
            column("again_at", Role::Derived),
            value("attempts"),
            value("died_at"),
            value("last_error"),
        ],
    },
    TableDescription {
        name: "invite",
        content: Content::Transferred { to: Table::Invite, key: 1 },
        columns: &[
            value("code"),
            value("uses"),
            value("uses_left"),
            value("username"),
            value("note"),
            value("created_at"),
            value("expires_at"),
        ],
    },
    // The rows of `payload` are moved as the payloads of their messages.
    TableDescription {
        name: "payload",
        content: Content::Local,
        columns: &[local("id"), local("bytes")],
    },
    TableDescription {
        name: "heartbeat",
        content: Content::Local,
        columns: &[local("id"), local("beats"), local("load"), local("clean")],
    },
    TableDescription {
        name: "store",
        content: Content::Local,
        columns: &[local("id"), local("store_id")],
    },
    TableDescription {
        name: "clock",
        content: Content::Local,
        columns: &[local("id"), local("believed"), local("shown"), local("proved")],
    },
];

/// The query for the canonical rows of a table.
#[derive(Debug)]
pub(crate) struct CanonicalRows {
    pub(crate) sql: String,
    /// The cells that are replaced by their SHA-256.
    pub(crate) hashed: Vec<usize>,
}

impl Column {
    fn value(&self) -> String {
        match self.role {
            Role::LargeValueOf(expression) => expression.to_owned(),
            _ => format!("t.{}", self.name),
        }
    }
}

impl TableDescription {
    /// Returns the description of a table that is moved.
    ///
    /// # Panics
    /// If the table has no description, which a test excludes.
    pub(crate) fn of(table: Table) -> &'static Self {
        let is_table = |description: &&Self| description.moved().is_some_and(|(to, _)| to == table);
        TABLES.iter().find(is_table).expect("a test finds a description of every moved table")
    }

    /// Returns the names of the moved columns as a list in SQL.
    #[cfg(test)]
    fn column_list(&self) -> String {
        self.moved_columns().map(|column| column.name).collect::<Vec<_>>().join(", ")
    }

    /// Returns the values of the moved columns as a list in SQL, in which `t` is the row.
    pub(crate) fn value_list(&self) -> String {
        self.moved_columns().map(|column| column.value()).collect::<Vec<_>>().join(", ")
    }

    /// Returns the names of the columns of the key as a list in SQL.
    pub(crate) fn key_list(&self) -> String {
        let key = self.moved().map_or(0, |(_, key)| key);
        self.moved_columns().take(key).map(|column| column.name).collect::<Vec<_>>().join(", ")
    }

    /// Returns the query for the canonical rows. The importer of the cluster has the same cells in
    /// the same order.
    pub(crate) fn canonical_rows(&self) -> CanonicalRows {
        let (mut cells, mut hashed, mut account) = (Vec::new(), Vec::new(), None);
        let mut filter = String::new();
        for column in self.columns {
            let Column { name, role } = column;
            match role {
                Role::Value => cells.push(column.value()),
                Role::LargeValue | Role::LargeValueOf(_) => {
                    hashed.push(cells.len());
                    cells.push(column.value());
                }
                Role::Account => {
                    cells.push("a.identity".to_owned());
                    account = Some(name);
                }
                Role::AccountInOrder(order) => {
                    cells.push("a.identity".to_owned());
                    cells.push(format!(
                        "row_number() OVER (PARTITION BY t.{name} ORDER BY t.{order})"
                    ));
                    account = Some(name);
                }
                Role::OrderWithin(of) => {
                    cells.push(format!("row_number() OVER (PARTITION BY t.{of} ORDER BY t.{name})"))
                }
                Role::UniqueKey => filter = format!(" WHERE t.{name} IS NULL"),
                Role::RowNumber | Role::Derived | Role::Local => {}
            }
        }
        let join =
            account.map_or(String::new(), |name| format!(" JOIN account a ON a.id = t.{name}"));
        let sql = format!("SELECT {} FROM {} t{join}{filter}", cells.join(", "), self.name);
        CanonicalRows { sql, hashed }
    }

    fn moved(&self) -> Option<(Table, usize)> {
        match self.content {
            Content::Transferred { to, key } => Some((to, key)),
            Content::Local => None,
        }
    }

    fn moved_columns(&self) -> impl Iterator<Item = &'static Column> {
        let is_moved = |column: &&Column| !matches!(column.role, Role::Derived | Role::Local);
        self.columns.iter().filter(is_moved)
    }
}

#[cfg(test)]
mod tests;
