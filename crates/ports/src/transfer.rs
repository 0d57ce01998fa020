//! What a store holds, as plain rows: for moving all of it into a store of another kind.
//!
//! A row is moved as it is, column by column, and nobody on its way interprets it; so nothing is
//! lost that only the store itself understands. Accounts have numbers that differ from store to
//! store, so two stores are compared by *canonical* rows, in which the account's identity stands in
//! place of its number, and a [`Digest`] over them that does not depend on their order.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// One kind of row. In the order in which they are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    Account,
    Session,
    Inbox,
    Message,
    RecentId,
    KeyPackage,
    KeyPackageGiven,
    HybridKey,
    Job,
}

/// A column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    pub name: &'static str,
    pub kind: Kind,
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Number,
    Text,
    Bytes,
}

/// One value of a row.
#[derive(Clone, PartialEq, Eq)]
pub enum Cell {
    Nothing,
    Number(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// The values of a row, in the order of its columns.
pub type Row = Vec<Cell>;

const fn number(name: &'static str) -> Column {
    Column { name, kind: Kind::Number }
}

const fn text(name: &'static str) -> Column {
    Column { name, kind: Kind::Text }
}

const fn bytes(name: &'static str) -> Column {
    Column { name, kind: Kind::Bytes }
}

impl Table {
    pub const ALL: [Self; 9] = [
        Self::Account,
        Self::Session,
        Self::Inbox,
        Self::Message,
        Self::RecentId,
        Self::KeyPackage,
        Self::KeyPackageGiven,
        Self::HybridKey,
        Self::Job,
    ];

    /// As the stores call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::Session => "session",
            Self::Inbox => "inbox",
            Self::Message => "message",
            Self::RecentId => "recent_id",
            Self::KeyPackage => "key_package",
            Self::KeyPackageGiven => "key_package_given",
            Self::HybridKey => "hybrid_key",
            Self::Job => "job",
        }
    }

    /// What is moved of each row: first the columns of the key, by which rows are moved in order.
    pub const fn columns(self) -> &'static [Column] {
        match self {
            Self::Account => {
                &const {
                    [
                        number("id"),
                        text("username"),
                        bytes("identity"),
                        bytes("opaque_record"),
                        number("created_at"),
                    ]
                }
            }
            Self::Session => {
                &const {
                    [
                        bytes("token"),
                        number("account"),
                        bytes("device"),
                        number("authenticated_at"),
                        number("last_used_at"),
                        number("expires_at"),
                    ]
                }
            }
            Self::Inbox => {
                &const {
                    [
                        number("id"),
                        number("last_seq"),
                        number("messages"),
                        number("bytes"),
                        number("next_expiry"),
                    ]
                }
            }
            Self::Message => {
                &const {
                    [
                        number("id"),
                        number("inbox"),
                        number("seq"),
                        number("expires_at"),
                        number("enqueued_at"),
                        bytes("channel"),
                        bytes("sender"),
                        bytes("message_id"),
                        bytes("payload_sha256"),
                        bytes("payload"),
                    ]
                }
            }
            Self::RecentId => {
                &const {
                    [
                        number("inbox"),
                        bytes("sender"),
                        bytes("message_id"),
                        number("seq"),
                        bytes("channel"),
                        bytes("payload_sha256"),
                        number("enqueued_at"),
                        number("forget_at"),
                    ]
                }
            }
            Self::KeyPackage => {
                &const {
                    [
                        number("id"),
                        number("owner"),
                        bytes("fingerprint"),
                        number("last_resort"),
                        number("not_after"),
                        bytes("bytes"),
                        number("not_before"),
                    ]
                }
            }
            Self::KeyPackageGiven => {
                &const { [number("owner"), bytes("fingerprint"), number("not_after")] }
            }
            Self::HybridKey => &const { [number("owner"), bytes("key")] },
            Self::Job => {
                &const {
                    [
                        number("id"),
                        text("kind"),
                        bytes("key"),
                        bytes("payload"),
                        number("run_at"),
                        number("attempts"),
                        number("died_at"),
                        text("last_error"),
                    ]
                }
            }
        }
    }

    /// The columns of the key.
    pub fn key(self) -> &'static [Column] {
        let length = match self {
            Self::RecentId => 3,
            Self::KeyPackageGiven => 2,
            _ => 1,
        };
        &self.columns()[..length]
    }

    /// The names of the columns as a list in SQL.
    pub fn column_list(self) -> String {
        list(self.columns())
    }

    /// The names of the key's columns as a list in SQL.
    pub fn key_list(self) -> String {
        list(self.key())
    }
}

fn list(columns: &[Column]) -> String {
    columns.iter().map(|column| column.name).collect::<Vec<_>>().join(", ")
}

impl Cell {
    /// Bytes it holds.
    pub fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Number(_) => size_of::<i64>(),
            Self::Text(text) => text.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds it to a hash so that no other sequence of cells gives the same bytes.
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

/// Of the contents, only how long they are: they are other people's.
impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell").field("bytes", &self.len()).finish_non_exhaustive()
    }
}

/// How many rows there are, and the sum of their SHA-256 as 256-bit numbers: the same for the same
/// rows in any order, another when one is missing, doubled or changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    pub rows: u64,
    sum: [u8; 32],
}

impl Digest {
    /// Counts a canonical row in.
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
    pub fn of(&self, table: Table) -> &Digest {
        &self.0[table as usize]
    }

    pub fn set(&mut self, table: Table, digest: Digest) {
        self.0[table as usize] = digest;
    }

    /// All rows there are.
    pub fn rows(&self) -> u64 {
        self.0.iter().map(|digest| digest.rows).sum()
    }
}

/// A line for each table, for people to read and for stores to keep.
impl fmt::Display for Digests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Table::ALL
            .iter()
            .try_for_each(|table| writeln!(f, "  {:<18}{}", table.name(), self.of(*table)))
    }
}

/// The SHA-256 of bytes, which stands for large ones in a canonical row.
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
    fn a_digest_heeds_every_row_and_not_their_order() {
        let (a, b) = ([Cell::Number(1), Cell::Nothing], [Cell::Number(2), Cell::Bytes(vec![7])]);
        assert_eq!(digest(&[&a, &b]), digest(&[&b, &a]));
        let others: [&[&[Cell]]; 4] = [&[&a], &[&a, &a], &[&a, &b, &b], &[]];
        for other in others {
            assert_ne!(digest(&[&a, &b]), digest(other));
        }
        // As many of each, so only the sum tells.
        assert_ne!(digest(&[&a, &a]), digest(&[&b, &b]));
    }

    #[test]
    fn cells_cannot_be_taken_for_others() {
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
    fn the_sum_carries_over_bytes() {
        // 256 times the same row: the sum is its hash times 256, so every byte moves up by one.
        let row = [Cell::Number(1)];
        let one = digest(&[&row]);
        let many = digest(&[&row[..]; 256]);
        assert_eq!((many.sum[0], &many.sum[1..]), (0, &one.sum[..31]));
    }
}
