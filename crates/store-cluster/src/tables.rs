//! The description of every table of the schema.
//!
//! The tables and statements by which a single node is moved in, the canonical rows that verify the
//! transfer, and the statements that erase a deleted account are generated from this description. A
//! test compares it with the schema, so a new table or column needs an entry here and a migration.

use std::fmt::Write as _;

use qpq_ports::transfer::{Column as TransferredColumn, ColumnType, Table};

/// A table and all of its columns.
#[derive(Debug)]
pub(crate) struct TableDescription {
    name: &'static str,
    content: Content,
    erased: &'static [Erased],
    columns: &'static [Column],
}

/// The treatment of a table by the erasure of a deleted account. A table may need several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Erased {
    /// The rows are deleted whose column has the number of the account.
    RowsOf(&'static str),
    /// The messages of the account's inbox are deleted, and the payloads that they share with no
    /// other message.
    MessagesOf(&'static str),
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
    /// The rows are deleted with the rows of another table that refer to them.
    With(&'static str),
    /// The rows are deleted whose column has the account's username, in the step that makes the
    /// account unusable: later steps do not know the name.
    RowsNaming(&'static str),
    /// The rows stay, and do not show whose they were.
    Tombstones,
    /// No row belongs to an account.
    Nothing,
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
    /// A key that both stores may have for the same reason. A row whose key exists already is not
    /// moved. See [`Key`](Self::Key).
    SharedKey,
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

/// All tables of the schema, except that of the migrations and the partitions of `message`.
/// Accounts come first, since the other rows are moved to their new numbers.
static TABLES: &[TableDescription] = &[
    TableDescription {
        name: "account",
        content: Content::Transferred(Table::Account),
        erased: &[Erased::Last],
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
        content: Content::Transferred(Table::Inbox),
        erased: &[Erased::RowsOf("id")],
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
            local("blocks"),
        ],
    },
    TableDescription {
        name: "message",
        content: Content::Transferred(Table::Message),
        erased: &[
            Erased::MessagesOf("inbox"),
            Erased::SenderOf { inbox: "inbox", sender: "sender", message_id: "message_id" },
        ],
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
        content: Content::Transferred(Table::KeyPackage),
        erased: &[Erased::RowsOf("owner")],
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
        erased: &[Erased::RowsOf("owner")],
        columns: &[column("owner", Role::Account), value("fingerprint"), value("not_after")],
    },
    TableDescription {
        name: "hybrid_key",
        content: Content::Transferred(Table::HybridKey),
        erased: &[Erased::RowsOf("owner")],
        columns: &[column("owner", Role::Account), value("key"), value("signature")],
    },
    TableDescription {
        name: "device",
        content: Content::Transferred(Table::Device),
        erased: &[Erased::RowsOf("account")],
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
        erased: &[Erased::RowsOf("inbox")],
        columns: &[column("inbox", Role::Account), value("seq"), value("device")],
    },
    TableDescription {
        name: "device_key",
        content: Content::Transferred(Table::DeviceKey),
        erased: &[Erased::Keys { account: "account", key: "key" }],
        columns: &[value("key"), column("account", Role::Account), value("device")],
    },
    TableDescription {
        name: "mls_group",
        content: Content::Transferred(Table::Group),
        erased: &[Erased::PairsWith("pair")],
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
        erased: &[Erased::Memberships],
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
        content: Content::Transferred(Table::Ban),
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
        content: Content::Transferred(Table::GroupBan),
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
        content: Content::Transferred(Table::Report),
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
        content: Content::Transferred(Table::Block),
        erased: &[Erased::RowsOf("account"), Erased::BlocksOf("blocked")],
        columns: &[column("account", Role::Account), value("blocked"), value("blocked_at")],
    },
    TableDescription {
        name: "audit",
        content: Content::Transferred(Table::Audit),
        erased: &[Erased::KeyIn("actor"), Erased::KeyIn("subject")],
        columns: &[
            column("id", Role::Renumbered),
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
        content: Content::Transferred(Table::Job),
        // A job refers to an account by a random id, never by its number, name or key.
        erased: &[Erased::Nothing],
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
        erased: &[Erased::RowsNaming("username")],
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
        name: "erasure",
        content: Content::Transferred(Table::Erasure),
        erased: &[Erased::Last],
        columns: &[
            value("id"),
            column("account", Role::Account),
            value("identity"),
            value("deleted_at"),
            // The erasure begins again after a transfer.
            local("begun_at"),
            local("after"),
        ],
    },
    TableDescription {
        name: "tombstone",
        content: Content::Transferred(Table::Tombstone),
        erased: &[Erased::Tombstones],
        columns: &[column("hash", Role::SharedKey), column("until", Role::Set("t.until"))],
    },
    TableDescription {
        name: "recovery_bundle",
        content: Content::Transferred(Table::RecoveryBundle),
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
    TableDescription {
        name: "payload",
        content: Content::Local,
        erased: &[Erased::With("message")],
        columns: &[local("id"), local("refs"), local("bytes")],
    },
    // Blobs are not moved: the bytes of those of a single node are in files.
    TableDescription {
        name: "blob",
        content: Content::Local,
        erased: &[Erased::With("blob_ref")],
        columns: &[local("hash"), local("object"), local("place"), local("size")],
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
            local("finishing_until"),
        ],
    },
    TableDescription {
        name: "blob_chunk",
        content: Content::Local,
        erased: &[Erased::With("upload")],
        columns: &[local("object"), local("start"), local("bytes")],
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
        columns: &[local("object"), local("place"), local("not_before"), local("removing")],
    },
    TableDescription {
        name: "cluster",
        content: Content::Local,
        erased: &[Erased::Nothing],
        columns: &[local("singleton"), local("opaque_setup")],
    },
    TableDescription {
        name: "heartbeat",
        content: Content::Local,
        erased: &[Erased::Nothing],
        columns: &[local("singleton"), local("beats")],
    },
    TableDescription {
        name: "store",
        content: Content::Local,
        erased: &[Erased::Nothing],
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
                Role::UniqueKey | Role::SharedKey => {
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
                Role::Local | Role::LocalAccount => continue,
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
            "UPDATE import_{name} t SET moved = n.moved
               FROM (SELECT {number}, nextval(pg_get_serial_sequence('{name}', '{number}')) AS moved
                       FROM (SELECT {number} FROM import_{name} ORDER BY {number}) o) n
              WHERE n.{number} = t.{number}"
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
                Role::Key | Role::SharedKey => {
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
                Role::RowNumber | Role::Set(_) | Role::Local | Role::LocalAccount => {}
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

/// A statement of an erasure, generated from a description.
#[derive(Debug)]
pub(crate) enum ErasureStep {
    /// Deletes rows of the account: $1 account, $2 maximum rows. Returns their number.
    DeleteRows(String),
    /// Removes the identity key from rows, or rows that have it: $1 identity key, $2 maximum rows.
    /// Returns the number of changed rows.
    ForgetKey(String),
    /// Removes the account from its groups.
    LeaveGroups,
    /// Replaces keys by tombstones: $1 account, $2 maximum rows. Returns the number of keys.
    RetireKeys(String),
}

/// The statements of an erasure.
#[derive(Debug)]
pub(crate) struct ErasureSteps {
    /// Statements for the account's own rows, in an order in which no remaining row refers to a
    /// deleted one.
    pub(crate) own: Vec<ErasureStep>,
    /// Statements for a range of inboxes that have messages of the account: $1 identity key, $2 the
    /// inbox before the first, $3 the last inbox, $4 maximum rows. Each returns the number of
    /// changed rows.
    pub(crate) in_inboxes: Vec<String>,
    /// Statements of the step that makes the account unusable: $1 the username.
    pub(crate) of_name: Vec<String>,
}

impl ErasureSteps {
    /// Generates the statements from the descriptions.
    pub(crate) fn generate() -> Self {
        let (mut own, mut in_inboxes, mut of_name) = (Vec::new(), Vec::new(), Vec::new());
        // A table is described after the tables that it refers to.
        for TableDescription { name, erased, .. } in TABLES.iter().rev() {
            for erased in *erased {
                match erased {
                    Erased::RowsOf(column) => {
                        own.push(ErasureStep::DeleteRows(delete_rows_of(name, column)));
                    }
                    Erased::MessagesOf(inbox) => {
                        own.push(ErasureStep::DeleteRows(delete_messages_of(name, inbox)));
                    }
                    Erased::PairsWith(pair) => own.extend(forget_pairs(name, pair)),
                    Erased::BlocksOf(blocked) => {
                        own.push(ErasureStep::ForgetKey(unblock(name, blocked)));
                    }
                    Erased::KeyIn(key) => {
                        own.push(ErasureStep::ForgetKey(bury_identity(name, key)));
                    }
                    Erased::Memberships => own.push(ErasureStep::LeaveGroups),
                    Erased::Keys { account, key } => {
                        own.push(ErasureStep::RetireKeys(retire_keys(name, account, key)));
                    }
                    Erased::RowsSentBy { inbox, sender } => {
                        in_inboxes.push(delete_sent_by(name, inbox, sender));
                    }
                    Erased::SenderOf { inbox, sender, message_id } => {
                        in_inboxes.push(forget_sender(name, inbox, sender, message_id));
                    }
                    Erased::RowsNaming(column) => {
                        of_name.push(format!("DELETE FROM {name} WHERE {column} = $1"));
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

/// Locks the rows first: a row that another transaction changes meanwhile has another `ctid`.
fn delete_rows_of(name: &str, column: &str) -> String {
    format!(
        "WITH removed AS (
             DELETE FROM {name} WHERE ctid = ANY (ARRAY (
                 SELECT ctid FROM {name} WHERE {column} = $1 LIMIT $2 FOR UPDATE)) RETURNING 1)
         SELECT count(*) FROM removed"
    )
}

fn delete_messages_of(name: &str, inbox: &str) -> String {
    let counted_down = crate::inboxes::COUNTED_DOWN;
    format!(
        "WITH due AS (SELECT seq FROM {name} WHERE {inbox} = $1 ORDER BY seq LIMIT $2 FOR UPDATE),
         removed AS (
             DELETE FROM {name} m USING due d WHERE m.{inbox} = $1 AND m.seq = d.seq
             RETURNING m.payload_id){counted_down}
         SELECT count(*) FROM removed"
    )
}

fn forget_pairs(name: &str, pair: &str) -> [ErasureStep; 2] {
    [1, 33].map(|first| {
        ErasureStep::ForgetKey(format!(
            "WITH changed AS (
                 UPDATE {name} SET {pair} = NULL WHERE id = ANY (ARRAY (
                     SELECT id FROM {name}
                      WHERE substr({pair}, {first}, 32) = $1 AND {pair} IS NOT NULL
                      ORDER BY id LIMIT $2 FOR NO KEY UPDATE)) RETURNING 1)
             SELECT count(*) FROM changed"
        ))
    })
}

/// Locks the heads of the inboxes that have the blocks, and counts the blocks down.
fn unblock(name: &str, blocked: &str) -> String {
    format!(
        "WITH due AS MATERIALIZED (
             SELECT i.id FROM {name} t JOIN inbox i ON i.id = t.account
              WHERE t.{blocked} = $1 ORDER BY i.id LIMIT $2),
         head AS MATERIALIZED (
             SELECT id FROM inbox WHERE id IN (SELECT id FROM due)
              ORDER BY id FOR NO KEY UPDATE),
         removed AS (
             DELETE FROM {name} t USING head h WHERE t.account = h.id AND t.{blocked} = $1
             RETURNING t.account),
         counted AS (
             UPDATE inbox i SET blocks = i.blocks - 1 FROM removed r WHERE i.id = r.account)
         SELECT count(*) FROM removed"
    )
}

fn bury_identity(name: &str, key: &str) -> String {
    format!(
        "WITH changed AS (
             UPDATE {name} SET {key} = sha256('qpq/key/1'::bytea || $1) WHERE id = ANY (ARRAY (
                 SELECT id FROM {name} WHERE {key} = $1 ORDER BY id LIMIT $2)) RETURNING 1)
         SELECT count(*) FROM changed"
    )
}

fn retire_keys(name: &str, account: &str, key: &str) -> String {
    format!(
        "WITH removed AS (
             DELETE FROM {name} WHERE {key} = ANY (ARRAY (
                 SELECT {key} FROM {name} WHERE {account} = $1 LIMIT $2)) RETURNING {key}),
         tombstones AS (
             INSERT INTO tombstone (hash) SELECT sha256('qpq/key/1'::bytea || {key}) FROM removed
             ON CONFLICT DO NOTHING)
         SELECT count(*) FROM removed"
    )
}

fn delete_sent_by(name: &str, inbox: &str, sender: &str) -> String {
    format!(
        "WITH removed AS (
             DELETE FROM {name} WHERE ctid = ANY (ARRAY (
                 SELECT t.ctid FROM inbox i JOIN {name} t ON t.{inbox} = i.id
                  WHERE i.id > $2 AND i.id <= $3 AND t.{sender} = $1
                  LIMIT $4 FOR UPDATE OF t)) RETURNING 1)
         SELECT count(*) FROM removed"
    )
}

/// Looks the messages with and without an id up separately, because each have an index.
fn forget_sender(name: &str, inbox: &str, sender: &str, message_id: &str) -> String {
    let with = |condition: &str| {
        format!(
            "(SELECT {inbox}, seq FROM {name}
               WHERE {inbox} = i.id AND {sender} = $1 AND {message_id} {condition} LIMIT $4)"
        )
    };
    let (with_id, without_id) = (with("IS NOT NULL"), with("IS NULL"));
    format!(
        "WITH found AS MATERIALIZED (
             SELECT x.{inbox}, x.seq
               FROM inbox i CROSS JOIN LATERAL ({with_id} UNION ALL {without_id}) x
              WHERE i.id > $2 AND i.id <= $3 LIMIT $4),
         changed AS (
             UPDATE {name} m
                SET {sender} = decode(repeat('00', 32), 'hex'), {message_id} = NULL
               FROM found f WHERE m.{inbox} = f.{inbox} AND m.seq = f.seq RETURNING 1)
         SELECT count(*) FROM changed"
    )
}

#[cfg(test)]
mod tests;
