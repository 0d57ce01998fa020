//! The description of every table of the schema.
//!
//! The column lists of the export, the canonical rows that verify a transfer, and the statements
//! that erase a deleted account are generated from these descriptions. A test compares them with
//! the schema, so a new table or column needs an entry here.

use qpq_ports::transfer::Table;

/// A table and all of its columns.
#[derive(Debug)]
pub(crate) struct TableDescription {
    pub(crate) name: &'static str,
    content: Content,
    erased: &'static [Erased],
    columns: &'static [Column],
}

/// The treatment of a table by the erasure of a deleted account. A table may need several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Erased {
    /// The rows are deleted whose column has the number of the account.
    RowsOf(&'static str),
    /// The rows are deleted that name the account's identity key in the column `sender`, in every
    /// inbox.
    RowsSentBy { inbox: &'static str, sender: &'static str },
    /// The rows stay that name the account's identity key in the column `sender`, in every inbox.
    /// The key is replaced by zeros. The message id, which only the sender could use again, becomes
    /// NULL.
    SenderOf { inbox: &'static str, sender: &'static str, message_id: &'static str },
    /// The column, which has two identity keys one after the other, becomes NULL where one of them
    /// is the account's.
    PairsWith(&'static str),
    /// The rows of other accounts are deleted whose column has the account's identity key, as by
    /// BlockUser (`blocks`).
    BlocksOf(&'static str),
    /// The identity key in the column is replaced by its tombstone.
    KeyIn(&'static str),
    /// The rows of the account are removed with the references to blobs and the bytes of uploads
    /// (`blobs`), before all others.
    BlobsOf(&'static str),
    /// The account leaves its groups, as by RemoveMember (`groups`).
    Memberships,
    /// The rows of the account are deleted. Their keys become tombstones.
    Keys { account: &'static str, key: &'static str },
    /// The row of the account is deleted in the last step, when nothing refers to it any more.
    Last,
    /// A trigger deletes the rows with the rows of another table that refer to them.
    With(&'static str),
    /// The rows are deleted whose column has the account's username, in the step that makes the
    /// account unusable: later steps do not know the name.
    RowsNaming(&'static str),
    /// The rows stay, and do not show whose they were.
    Tombstones,
    /// No row belongs to an account.
    Nothing,
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
    /// A number that is moved and not compared. Not in canonical rows.
    RowNumber,
    /// The key of a row that the cluster may have already. Rows with a key are left out of the
    /// canonical rows.
    UniqueKey,
    /// A value that follows from other columns. Neither moved nor part of the canonical row.
    Derived,
    /// A column of a table that is not moved.
    Local,
    /// The number of an account, in a table that is not moved.
    LocalAccount,
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
        erased: &[Erased::Last],
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
        erased: &[Erased::RowsOf("account")],
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
        erased: &[Erased::RowsOf("id")],
        columns: &[
            column("id", Role::Account),
            value("last_seq"),
            value("messages"),
            value("bytes"),
            value("next_expiry"),
            column("devices", Role::Derived),
            column("blocks", Role::Derived),
        ],
    },
    TableDescription {
        name: "message",
        content: Content::Transferred { to: Table::Message, key: 1 },
        erased: &[
            Erased::RowsOf("inbox"),
            Erased::SenderOf { inbox: "inbox", sender: "sender", message_id: "message_id" },
        ],
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
        erased: &[Erased::RowsOf("inbox"), Erased::RowsSentBy { inbox: "inbox", sender: "sender" }],
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
        erased: &[Erased::RowsOf("owner")],
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
        erased: &[Erased::RowsOf("owner")],
        columns: &[column("owner", Role::Account), value("fingerprint"), value("not_after")],
    },
    TableDescription {
        name: "hybrid_key",
        content: Content::Transferred { to: Table::HybridKey, key: 1 },
        erased: &[Erased::RowsOf("owner")],
        columns: &[column("owner", Role::Account), value("key"), value("signature")],
    },
    TableDescription {
        name: "device",
        content: Content::Transferred { to: Table::Device, key: 1 },
        erased: &[Erased::RowsOf("account")],
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
        erased: &[Erased::RowsOf("inbox")],
        columns: &[column("inbox", Role::Account), value("seq"), value("device")],
    },
    TableDescription {
        name: "device_key",
        content: Content::Transferred { to: Table::DeviceKey, key: 1 },
        erased: &[Erased::Keys { account: "account", key: "key" }],
        columns: &[value("key"), column("account", Role::Account), value("device")],
    },
    TableDescription {
        name: "mls_group",
        content: Content::Transferred { to: Table::Group, key: 1 },
        erased: &[Erased::PairsWith("pair")],
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
        erased: &[Erased::Memberships],
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
        erased: &[Erased::RowsOf("account")],
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
        name: "ban",
        content: Content::Transferred { to: Table::Ban, key: 1 },
        erased: &[Erased::RowsOf("account")],
        columns: &[
            column("account", Role::Account),
            value("reason"),
            value("banned_at"),
            value("expires_at"),
        ],
    },
    TableDescription {
        name: "group_ban",
        content: Content::Transferred { to: Table::GroupBan, key: 2 },
        erased: &[Erased::RowsOf("account")],
        columns: &[
            value("group_id"),
            column("account", Role::Account),
            value("reason"),
            value("banned_at"),
            value("expires_at"),
        ],
    },
    TableDescription {
        name: "report",
        content: Content::Transferred { to: Table::Report, key: 1 },
        erased: &[Erased::RowsOf("reporter")],
        columns: &[
            column("id", Role::RowNumber),
            column("reporter", Role::AccountInOrder("id")),
            value("digest"),
            value("conversation_id"),
            value("encrypted_report"),
            value("reported_at"),
        ],
    },
    TableDescription {
        name: "block",
        content: Content::Transferred { to: Table::Block, key: 2 },
        erased: &[Erased::RowsOf("account"), Erased::BlocksOf("blocked")],
        columns: &[column("account", Role::Account), value("blocked"), value("blocked_at")],
    },
    TableDescription {
        name: "audit",
        content: Content::Transferred { to: Table::Audit, key: 1 },
        erased: &[Erased::KeyIn("actor"), Erased::KeyIn("subject")],
        columns: &[
            column("id", Role::RowNumber),
            value("at"),
            value("actor"),
            value("action"),
            value("subject"),
            value("group_id"),
            value("reason"),
        ],
    },
    TableDescription {
        name: "job",
        content: Content::Transferred { to: Table::Job, key: 1 },
        // A job refers to an account by a random id, never by its number, name or key.
        erased: &[Erased::Nothing],
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
        erased: &[Erased::RowsNaming("username")],
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
    TableDescription {
        name: "erasure",
        content: Content::Transferred { to: Table::Erasure, key: 1 },
        erased: &[Erased::Last],
        columns: &[
            value("id"),
            column("account", Role::Account),
            value("identity"),
            value("deleted_at"),
            // The erasure begins again after a transfer.
            column("begun_at", Role::Derived),
            column("after", Role::Derived),
        ],
    },
    TableDescription {
        name: "tombstone",
        content: Content::Transferred { to: Table::Tombstone, key: 1 },
        erased: &[Erased::Tombstones],
        columns: &[value("hash"), column("until", Role::RowNumber)],
    },
    TableDescription {
        name: "recovery_bundle",
        content: Content::Transferred { to: Table::RecoveryBundle, key: 1 },
        erased: &[Erased::RowsOf("account")],
        columns: &[
            column("account", Role::Account),
            value("version"),
            value("bundle"),
            value("key_id"),
            value("stored_at"),
            value("counted_from"),
            value("fetches"),
        ],
    },
    // Blobs are not moved: their bytes are in files.
    TableDescription {
        name: "blob",
        content: Content::Local,
        erased: &[Erased::With("blob_ref")],
        columns: &[local("hash"), local("object"), local("size")],
    },
    TableDescription {
        name: "blob_ref",
        content: Content::Local,
        erased: &[Erased::BlobsOf("account")],
        columns: &[
            column("account", Role::LocalAccount),
            local("hash"),
            local("mime"),
            local("expires_at"),
        ],
    },
    TableDescription {
        name: "upload",
        content: Content::Local,
        erased: &[Erased::BlobsOf("account")],
        columns: &[
            column("account", Role::LocalAccount),
            local("hash"),
            local("object"),
            local("size"),
            local("received"),
            local("mime"),
            local("expires_at"),
        ],
    },
    TableDescription {
        name: "blob_quota",
        content: Content::Local,
        erased: &[Erased::RowsOf("account")],
        columns: &[column("account", Role::LocalAccount), local("used")],
    },
    TableDescription {
        name: "blob_trash",
        content: Content::Local,
        erased: &[Erased::Nothing],
        columns: &[local("object"), local("not_before")],
    },
    // The rows of `payload` are moved as the payloads of their messages.
    TableDescription {
        name: "payload",
        content: Content::Local,
        erased: &[Erased::With("message")],
        columns: &[local("id"), local("bytes")],
    },
    TableDescription {
        name: "heartbeat",
        content: Content::Local,
        erased: &[Erased::Nothing],
        columns: &[local("id"), local("beats"), local("load"), local("clean")],
    },
    TableDescription {
        name: "store",
        content: Content::Local,
        erased: &[Erased::Nothing],
        columns: &[local("id"), local("store_id")],
    },
    TableDescription {
        name: "clock",
        content: Content::Local,
        erased: &[Erased::Nothing],
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
                Role::RowNumber | Role::Derived | Role::Local | Role::LocalAccount => {}
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
        let is_moved = |column: &&Column| {
            !matches!(column.role, Role::Derived | Role::Local | Role::LocalAccount)
        };
        self.columns.iter().filter(is_moved)
    }
}

/// A statement of an erasure, generated from a description.
#[derive(Debug)]
pub(crate) enum ErasureStep {
    /// Deletes rows of the account: ?1 account, ?2 maximum rows.
    DeleteRows(String),
    /// Removes the identity key from rows, or rows that have it: ?1 identity key, ?2 maximum rows.
    ForgetKey(String),
    /// Replaces the identity key by its tombstone: ?1 identity key, ?2 maximum rows, ?3 tombstone.
    BuryIdentity(String),
    /// Removes the account from its groups.
    LeaveGroups,
    /// Replaces keys by tombstones. `find` returns keys: ?1 account, ?2 maximum rows. `delete`
    /// deletes the row of the key ?1.
    RetireKeys { find: String, delete: String },
}

/// The statements of an erasure.
#[derive(Debug)]
pub(crate) struct ErasureSteps {
    /// Statements for the account's own rows, in an order in which no remaining row refers to a
    /// deleted one.
    pub(crate) own: Vec<ErasureStep>,
    /// Statements for a range of inboxes that have messages of the account: ?1 identity key, ?2 the
    /// inbox before the first, ?3 the last inbox, ?4 maximum rows.
    pub(crate) in_inboxes: Vec<String>,
    /// Statements of the step that makes the account unusable: ?1 the username.
    pub(crate) of_name: Vec<String>,
}

impl ErasureSteps {
    /// Generates the statements from the descriptions.
    pub(crate) fn generate() -> Self {
        let (mut own, mut in_inboxes, mut of_name) = (Vec::new(), Vec::new(), Vec::new());
        // A table is described after the tables that it refers to.
        for table in TABLES.iter().rev() {
            for erased in table.erased {
                match *erased {
                    Erased::RowsOf(column) => {
                        own.push(ErasureStep::DeleteRows(table.delete_rows_of(column)));
                    }
                    Erased::PairsWith(pair) => own.extend(table.forget_pairs(pair)),
                    Erased::BlocksOf(blocked) => {
                        own.push(ErasureStep::ForgetKey(table.delete_rows_of(blocked)));
                    }
                    Erased::KeyIn(key) => {
                        own.push(ErasureStep::BuryIdentity(table.bury_identity(key)));
                    }
                    Erased::Memberships => own.push(ErasureStep::LeaveGroups),
                    Erased::Keys { account, key } => own.push(table.retire_keys(account, key)),
                    Erased::RowsSentBy { inbox, sender } => {
                        in_inboxes.push(table.delete_sent_by(inbox, sender));
                    }
                    Erased::SenderOf { inbox, sender, message_id } => {
                        in_inboxes.extend(table.forget_sender(inbox, sender, message_id));
                    }
                    Erased::RowsNaming(column) => {
                        of_name.push(format!("DELETE FROM {} WHERE {column} = ?1", table.name));
                    }
                    Erased::Last
                    | Erased::BlobsOf(_)
                    | Erased::With(_)
                    | Erased::Tombstones
                    | Erased::Nothing => {}
                }
            }
        }
        Self { own, in_inboxes, of_name }
    }
}

impl TableDescription {
    /// Returns the columns that identify a row, as a list in SQL.
    fn row_key(&self) -> String {
        self.moved().map_or_else(|| "rowid".to_owned(), |_| self.key_list())
    }

    fn delete_rows_of(&self, column: &str) -> String {
        let (name, key) = (self.name, self.row_key());
        format!(
            "DELETE FROM {name} WHERE ({key}) IN (
                 SELECT {key} FROM {name} WHERE {column} = ?1 LIMIT +?2)"
        )
    }

    fn forget_pairs(&self, pair: &str) -> [ErasureStep; 2] {
        let (name, key) = (self.name, self.row_key());
        [1, 33].map(|first| {
            ErasureStep::ForgetKey(format!(
                "UPDATE {name} SET {pair} = NULL WHERE ({key}) IN (
                     SELECT {key} FROM {name}
                      WHERE substr({pair}, {first}, 32) = ?1 AND {pair} IS NOT NULL LIMIT +?2)"
            ))
        })
    }

    fn bury_identity(&self, key: &str) -> String {
        let name = self.name;
        format!(
            "UPDATE {name} SET {key} = ?3 WHERE id IN (
                 SELECT id FROM {name} WHERE {key} = ?1 LIMIT +?2)"
        )
    }

    fn retire_keys(&self, account: &str, key: &str) -> ErasureStep {
        let name = self.name;
        ErasureStep::RetireKeys {
            find: format!("SELECT {key} FROM {name} WHERE {account} = ?1 LIMIT +?2"),
            delete: format!("DELETE FROM {name} WHERE {key} = ?1"),
        }
    }

    /// Returns the rows of a sender in a range of inboxes, as a query in SQL.
    fn sent_by(&self, inbox: &str, sender: &str, also: &str) -> String {
        let name = self.name;
        let key: Vec<_> = self.row_key().split(", ").map(|column| format!("t.{column}")).collect();
        let key = key.join(", ");
        format!(
            "SELECT {key} FROM inbox i CROSS JOIN {name} t
              WHERE i.id > ?2 AND i.id <= ?3 AND t.{inbox} = i.id AND t.{sender} = ?1{also}
              LIMIT +?4"
        )
    }

    fn delete_sent_by(&self, inbox: &str, sender: &str) -> String {
        let (name, key, rows) = (self.name, self.row_key(), self.sent_by(inbox, sender, ""));
        format!("DELETE FROM {name} WHERE ({key}) IN ({rows})")
    }

    /// Two statements, because the messages with and without an id have an index each.
    fn forget_sender(&self, inbox: &str, sender: &str, message_id: &str) -> [String; 2] {
        let (name, key) = (self.name, self.row_key());
        ["IS NOT NULL", "IS NULL"].map(|condition| {
            let rows = self.sent_by(inbox, sender, &format!(" AND t.{message_id} {condition}"));
            format!(
                "UPDATE {name} SET {sender} = zeroblob(32), {message_id} = NULL
                  WHERE ({key}) IN ({rows})"
            )
        })
    }
}

#[cfg(test)]
mod tests;
