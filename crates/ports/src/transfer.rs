//! The contents of a store as plain rows, for a transfer into a store of another kind.
//!
//! A row is transferred column by column and is not interpreted on the way, so values that only a
//! store understands are kept. The numbers of accounts differ from store to store. Two stores are
//! therefore compared by *canonical* rows, in which an account's identity key replaces its number,
//! and by a [`Digest`] over them that does not depend on their order. Each store describes its own
//! tables and generates its SQL from the descriptions. This module has the names and types that all
//! stores share.

mod columns;

use std::fmt;

use sha2::{Digest as _, Sha256};

/// A table that is transferred. The variants are in the order of the transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Accounts.
    Account,
    /// Sessions.
    Session,
    /// The heads of inboxes.
    Inbox,
    /// Messages.
    Message,
    /// Message ids that are remembered after the removal of their messages.
    RecentId,
    /// KeyPackages.
    KeyPackage,
    /// KeyPackages that were taken.
    KeyPackageTaken,
    /// Hybrid keys.
    HybridKey,
    /// Devices, and their positions in the inboxes.
    Device,
    /// Messages after the position of a device that the device has already completed.
    DeviceCompleted,
    /// Device keys that are or were registered.
    DeviceKey,
    /// Groups.
    Group,
    /// Members of groups.
    GroupMember,
    /// Commits that were accepted.
    GroupCommit,
    /// Bans of the server.
    Ban,
    /// Bans of groups.
    GroupBan,
    /// Reports.
    Report,
    /// Blocks.
    Block,
    /// The audit trail.
    Audit,
    /// Jobs.
    Job,
    /// Invites.
    Invite,
    /// Erasures of deleted accounts.
    Erasure,
    /// Keys and names that may not be registered.
    Tombstone,
    /// Recovery bundles.
    RecoveryBundle,
}

/// A column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// The name in the schema.
    pub name: &'static str,
    /// The type of the values.
    pub kind: ColumnType,
}

/// The type of the values of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    /// A 64-bit integer.
    Number,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
}

/// One value of a row.
#[derive(Clone, PartialEq, Eq)]
pub enum Cell {
    /// NULL.
    Nothing,
    /// A 64-bit integer.
    Number(i64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// The values of a row, in the order of its columns.
pub type Row = Vec<Cell>;

impl Table {
    /// All tables, in the order of the transfer.
    pub const ALL: [Self; 24] = [
        Self::Account,
        Self::Session,
        Self::Inbox,
        Self::Message,
        Self::RecentId,
        Self::KeyPackage,
        Self::KeyPackageTaken,
        Self::HybridKey,
        Self::Device,
        Self::DeviceCompleted,
        Self::DeviceKey,
        Self::Group,
        Self::GroupMember,
        Self::GroupCommit,
        Self::Ban,
        Self::GroupBan,
        Self::Report,
        Self::Block,
        Self::Audit,
        Self::Job,
        Self::Invite,
        Self::Erasure,
        Self::Tombstone,
        Self::RecoveryBundle,
    ];

    /// Returns the name of the table in the schemas.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::Session => "session",
            Self::Inbox => "inbox",
            Self::Message => "message",
            Self::RecentId => "recent_id",
            Self::KeyPackage => "key_package",
            Self::KeyPackageTaken => "key_package_given",
            Self::HybridKey => "hybrid_key",
            Self::Device => "device",
            Self::DeviceCompleted => "device_done",
            Self::DeviceKey => "device_key",
            Self::Group => "mls_group",
            Self::GroupMember => "group_member",
            Self::GroupCommit => "group_commit",
            Self::Ban => "ban",
            Self::GroupBan => "group_ban",
            Self::Report => "report",
            Self::Block => "block",
            Self::Audit => "audit",
            Self::Job => "job",
            Self::Invite => "invite",
            Self::Erasure => "erasure",
            Self::Tombstone => "tombstone",
            Self::RecoveryBundle => "recovery_bundle",
        }
    }

    /// Returns the columns that are transferred. The first ones are the key, which orders the rows.
    pub const fn columns(self) -> &'static [Column] {
        match self {
            Self::Account => columns::ACCOUNT,
            Self::Session => columns::SESSION,
            Self::Inbox => columns::INBOX,
            Self::Message => columns::MESSAGE,
            Self::RecentId => columns::RECENT_ID,
            Self::KeyPackage => columns::KEY_PACKAGE,
            Self::KeyPackageTaken => columns::KEY_PACKAGE_TAKEN,
            Self::HybridKey => columns::HYBRID_KEY,
            Self::Device => columns::DEVICE,
            Self::DeviceCompleted => columns::DEVICE_COMPLETED,
            Self::DeviceKey => columns::DEVICE_KEY,
            Self::Group => columns::GROUP,
            Self::GroupMember => columns::GROUP_MEMBER,
            Self::GroupCommit => columns::GROUP_COMMIT,
            Self::Ban => columns::BAN,
            Self::GroupBan => columns::GROUP_BAN,
            Self::Report => columns::REPORT,
            Self::Block => columns::BLOCK,
            Self::Audit => columns::AUDIT,
            Self::Job => columns::JOB,
            Self::Invite => columns::INVITE,
            Self::Erasure => columns::ERASURE,
            Self::Tombstone => columns::TOMBSTONE,
            Self::RecoveryBundle => columns::RECOVERY_BUNDLE,
        }
    }

    /// Returns the columns of the key.
    pub fn key(self) -> &'static [Column] {
        let length = match self {
            Self::RecentId | Self::DeviceCompleted | Self::GroupCommit => 3,
            Self::KeyPackageTaken | Self::GroupBan | Self::Block => 2,
            _ => 1,
        };
        &self.columns()[..length]
    }

    /// Returns the names of the columns, separated by commas.
    pub fn column_list(self) -> String {
        list(self.columns())
    }

    /// Returns the names of the key's columns, separated by commas.
    pub fn key_list(self) -> String {
        list(self.key())
    }
}

fn list(columns: &[Column]) -> String {
    columns.iter().map(|column| column.name).collect::<Vec<_>>().join(", ")
}

impl Cell {
    /// Returns the length of the value in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Number(_) => size_of::<i64>(),
            Self::Text(text) => text.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    /// Returns whether the value has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds the value to a hash. Different sequences of values add different bytes.
    fn hash(&self, hash: &mut Sha256) {
        let number;
        let (tag, bytes): (u8, &[u8]) = match self {
            Self::Nothing => (0, &[]),
            Self::Number(n) => {
                number = n.to_be_bytes();
                (1, &number)
            }
            Self::Text(text) => (2, text.as_bytes()),
            Self::Bytes(bytes) => (3, bytes),
        };
        hash.update([tag]);
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    }
}

/// Writes only the length, because the contents belong to the accounts.
impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell").field("bytes", &self.len()).finish_non_exhaustive()
    }
}

/// The number of rows, and the sum of their SHA-256 hashes as 256-bit numbers: equal for the same
/// rows in any order, different when a row is missing, doubled or changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// The number of rows.
    pub rows: u64,
    sum: [u8; 32],
}

impl Digest {
    /// Adds a canonical row.
    pub fn add(&mut self, row: &[Cell]) {
        let mut hash = Sha256::new();
        row.iter().for_each(|cell| cell.hash(&mut hash));
        let mut carry = false;
        for (sum, byte) in self.sum.iter_mut().zip(hash.finalize()) {
            let (with_byte, one) = sum.overflowing_add(byte);
            let (with_carry, other) = with_byte.overflowing_add(carry.into());
            (*sum, carry) = (with_carry, one || other);
        }
        self.rows += 1;
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10}  ", self.rows)?;
        self.sum.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One digest for each table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests([Digest; Table::ALL.len()]);

impl Digests {
    /// Returns the digest of a table.
    pub fn of(&self, table: Table) -> &Digest {
        &self.0[table as usize]
    }

    /// Sets the digest of a table.
    pub fn set(&mut self, table: Table, digest: Digest) {
        self.0[table as usize] = digest;
    }

    /// Returns the number of rows of all tables.
    pub fn rows(&self) -> u64 {
        self.0.iter().map(|digest| digest.rows).sum()
    }
}

/// One line for each table, for people to read and for stores to compare.
impl fmt::Display for Digests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Table::ALL
            .iter()
            .try_for_each(|table| writeln!(f, "  {:<18}{}", table.name(), self.of(*table)))
    }
}

/// Returns the SHA-256 of bytes, which replaces large values in a canonical row.
pub fn sha256(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(rows: &[&[Cell]]) -> Digest {
        let mut digest = Digest::default();
        rows.iter().for_each(|row| digest.add(row));
        digest
    }

    #[test]
    fn a_digest_depends_on_every_row_and_not_on_their_order() {
        let (a, b) = ([Cell::Number(1), Cell::Nothing], [Cell::Number(2), Cell::Bytes(vec![7])]);
        assert_eq!(digest(&[&a, &b]), digest(&[&b, &a]));
        let others: [&[&[Cell]]; 4] = [&[&a], &[&a, &a], &[&a, &b, &b], &[]];
        for other in others {
            assert_ne!(digest(&[&a, &b]), digest(other));
        }
        // The numbers of rows are equal, so only the sum differs.
        assert_ne!(digest(&[&a, &a]), digest(&[&b, &b]));
    }

    #[test]
    fn different_cells_have_different_digests() {
        let rows: [&[Cell]; 7] = [
            &[Cell::Nothing],
            &[Cell::Bytes(vec![])],
            &[Cell::Text(String::new())],
            &[Cell::Number(0)],
            &[Cell::Bytes(vec![0; 8])],
            &[Cell::Bytes(b"ab".to_vec()), Cell::Bytes(b"c".to_vec())],
            &[Cell::Bytes(b"a".to_vec()), Cell::Bytes(b"bc".to_vec())],
        ];
        for (i, one) in rows.iter().enumerate() {
            for other in &rows[i + 1..] {
                assert_ne!(digest(&[one]), digest(&[other]));
            }
        }
    }

    #[test]
    fn adding_hashes_carries_into_the_next_byte() {
        // For 256 equal rows the sum is the hash times 256, so every byte moves up by one.
        let row = [Cell::Number(1)];
        let one = digest(&[&row]);
        let many = digest(&[&row[..]; 256]);
        assert_eq!((many.sum[0], &many.sum[1..]), (0, &one.sum[..31]));
    }
}
