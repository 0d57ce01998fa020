//! Items: entries of a table that have an order, such as a history or a queue.

use rusqlite::{OptionalExtension as _, Row, params};

use super::{Database, DatabaseError, Table, Value, seal::Name};

/// An item of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub number: u64,
    /// Whether the item still needs work.
    pub open: bool,
    pub value: Value,
}

/// The attributes by which a new item can be found.
#[derive(Debug, Clone, Copy, Default)]
pub struct NewItem<'a> {
    /// The key of the item, unique in its table.
    pub key: Option<&'a [u8]>,
    /// The lane by which the item is listed.
    pub lane: Option<&'a [u8]>,
    /// Whether the item needs work.
    pub open: bool,
}

/// The number of items of a table, and the bytes of their sealed values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub items: u64,
    pub bytes: u64,
}

/// The unit in which the size of a lane is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    Items,
    Bytes,
}

/// An item whose value is still sealed.
struct Sealed {
    number: i64,
    open: bool,
    value: Vec<u8>,
}

const COLUMNS: &str = "number, open, value";

impl Database {
    /// Appends an item; returns its number, which is never used twice in a table.
    pub fn append(
        &self,
        table: Table,
        new: NewItem<'_>,
        value: &[u8],
    ) -> Result<u64, DatabaseError> {
        let number = self.next_number(table)?;
        self.insert(table, number, new, value)?;
        Ok(number)
    }

    /// Inserts an item under a given number. Items that are appended later get higher numbers.
    pub fn insert(
        &self,
        table: Table,
        number: u64,
        new: NewItem<'_>,
        value: &[u8],
    ) -> Result<(), DatabaseError> {
        self.skip_numbers(table, number.saturating_add(1))?;
        let key = new.key.map(|key| self.key(table, key));
        let lane = new.lane.map(|lane| self.lane(table, lane));
        let sealed = self.inner.secrets.seal(&place(table, number), value);
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(
            "INSERT INTO items (tab, number, key, lane, open, value)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?;
        statement.execute(params![table.0, signed(number)?, key, lane, new.open, sealed])?;
        Ok(())
    }

    /// Returns the number of the next item.
    pub fn next_number(&self, table: Table) -> Result<u64, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT next FROM counters WHERE tab = ?1")?;
        let next: Option<i64> = statement.query_row([table.0], |row| row.get(0)).optional()?;
        Ok(next.map_or(0, i64::cast_unsigned))
    }

    /// Reserves the numbers below this one: the next item has at least this number.
    pub fn skip_numbers(&self, table: Table, next: u64) -> Result<(), DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(
            "INSERT INTO counters VALUES (?1, ?2)
             ON CONFLICT (tab) DO UPDATE SET next = max(next, excluded.next)",
        )?;
        statement.execute(params![table.0, signed(next)?])?;
        Ok(())
    }

    /// Returns the item of this number.
    pub fn item(&self, table: Table, number: u64) -> Result<Option<Item>, DatabaseError> {
        let sql = format!("SELECT {COLUMNS} FROM items WHERE tab = ?1 AND number = ?2");
        Ok(self.items(table, &sql, params![table.0, signed(number)?])?.pop())
    }

    /// Returns the item of this key.
    pub fn item_of_key(&self, table: Table, key: &[u8]) -> Result<Option<Item>, DatabaseError> {
        let sql = format!("SELECT {COLUMNS} FROM items WHERE tab = ?1 AND key = ?2");
        Ok(self.items(table, &sql, params![table.0, self.key(table, key)])?.pop())
    }

    /// Returns up to `limit` items after a number, lowest first.
    pub fn items_after(
        &self,
        table: Table,
        after: Option<u64>,
        limit: u32,
    ) -> Result<Vec<Item>, DatabaseError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM items WHERE tab = ?1 AND number > ?2 ORDER BY number LIMIT ?3"
        );
        self.items(table, &sql, params![table.0, after_number(after)?, limit])
    }

    /// Returns up to `limit` open items after a number, lowest first.
    pub fn open_items(
        &self,
        table: Table,
        after: Option<u64>,
        limit: u32,
    ) -> Result<Vec<Item>, DatabaseError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM items WHERE tab = ?1 AND number > ?2 AND open
             ORDER BY number LIMIT ?3"
        );
        self.items(table, &sql, params![table.0, after_number(after)?, limit])
    }

    /// Returns the last `limit` items of a lane, highest first.
    pub fn last_in_lane(
        &self,
        table: Table,
        lane: &[u8],
        limit: u32,
    ) -> Result<Vec<Item>, DatabaseError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM items WHERE tab = ?1 AND lane = ?2
             ORDER BY number DESC LIMIT ?3"
        );
        self.items(table, &sql, params![table.0, self.lane(table, lane), limit])
    }

    /// Returns the items of a lane, lowest first.
    pub fn in_lane_ascending(&self, table: Table, lane: &[u8]) -> Result<Vec<Item>, DatabaseError> {
        let sql =
            format!("SELECT {COLUMNS} FROM items WHERE tab = ?1 AND lane = ?2 ORDER BY number");
        self.items(table, &sql, params![table.0, self.lane(table, lane)])
    }

    /// Returns the lowest item of a lane.
    pub fn first_in_lane(&self, table: Table, lane: &[u8]) -> Result<Option<Item>, DatabaseError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM items WHERE tab = ?1 AND lane = ?2 ORDER BY number LIMIT 1"
        );
        Ok(self.items(table, &sql, params![table.0, self.lane(table, lane)])?.pop())
    }

    /// Returns the lowest item of the largest lane; of several such lanes, the one with the lowest
    /// item.
    pub fn first_in_largest_lane(
        &self,
        table: Table,
        measure: Measure,
    ) -> Result<Option<Item>, DatabaseError> {
        let largest = match measure {
            Measure::Items => "count(*)",
            Measure::Bytes => "sum(length(value))",
        };
        let sql = format!(
            "SELECT {COLUMNS} FROM items WHERE tab = ?1 AND lane = (
                 SELECT lane FROM items WHERE tab = ?1 AND lane IS NOT NULL
                 GROUP BY lane ORDER BY {largest} DESC, min(number) LIMIT 1
             ) ORDER BY number LIMIT 1"
        );
        Ok(self.items(table, &sql, params![table.0])?.pop())
    }

    /// Returns the number of the item of this key, without opening its value.
    pub fn number_of_key(&self, table: Table, key: &[u8]) -> Result<Option<u64>, DatabaseError> {
        let key = self.key(table, key);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT number FROM items WHERE tab = ?1 AND key = ?2")?;
        let number: Option<i64> =
            statement.query_row(params![table.0, key], |row| row.get(0)).optional()?;
        Ok(number.map(i64::cast_unsigned))
    }

    /// Returns the size of a table.
    pub fn size_of_items(&self, table: Table) -> Result<Size, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(
            "SELECT count(*), coalesce(sum(length(value)), 0) FROM items WHERE tab = ?1",
        )?;
        let number = |row: &Row<'_>, column| row.get::<_, i64>(column).map(i64::cast_unsigned);
        Ok(statement.query_row([table.0], |row| {
            Ok(Size { items: number(row, 0)?, bytes: number(row, 1)? })
        })?)
    }

    /// Returns the number of open items of a lane.
    pub fn count_open(&self, table: Table, lane: &[u8]) -> Result<u64, DatabaseError> {
        let lane: Name = self.lane(table, lane);
        let connection = self.inner.connection.lock();
        let mut statement = connection
            .prepare_cached("SELECT count(*) FROM items WHERE tab = ?1 AND lane = ?2 AND open")?;
        let count: i64 = statement.query_row(params![table.0, lane], |row| row.get(0))?;
        Ok(count.cast_unsigned())
    }

    /// Opens or closes an item; returns whether this changed the item.
    pub fn set_open(&self, table: Table, number: u64, open: bool) -> Result<bool, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(
            "UPDATE items SET open = ?3 WHERE tab = ?1 AND number = ?2 AND open <> ?3",
        )?;
        Ok(statement.execute(params![table.0, signed(number)?, open])? > 0)
    }

    /// Replaces an item's value.
    pub fn replace_item(
        &self,
        table: Table,
        number: u64,
        value: &[u8],
    ) -> Result<(), DatabaseError> {
        let sealed = self.inner.secrets.seal(&place(table, number), value);
        let connection = self.inner.connection.lock();
        let mut statement = connection
            .prepare_cached("UPDATE items SET value = ?3 WHERE tab = ?1 AND number = ?2")?;
        statement.execute(params![table.0, signed(number)?, sealed])?;
        Ok(())
    }

    /// Removes an item.
    pub fn remove_item(&self, table: Table, number: u64) -> Result<(), DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("DELETE FROM items WHERE tab = ?1 AND number = ?2")?;
        statement.execute(params![table.0, signed(number)?])?;
        Ok(())
    }

    /// Removes every item of a lane.
    pub fn remove_items_in_lane(&self, table: Table, lane: &[u8]) -> Result<(), DatabaseError> {
        let lane = self.lane(table, lane);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("DELETE FROM items WHERE tab = ?1 AND lane = ?2")?;
        statement.execute(params![table.0, lane])?;
        Ok(())
    }

    fn items(
        &self,
        table: Table,
        sql: &str,
        parameters: &[&dyn rusqlite::ToSql],
    ) -> Result<Vec<Item>, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(sql)?;
        let rows = statement.query_map(parameters, |row: &Row<'_>| {
            Ok(Sealed { number: row.get(0)?, open: row.get(1)?, value: row.get(2)? })
        })?;
        rows.map(|row| {
            let Sealed { number, open, value } = row?;
            let number = number.cast_unsigned();
            let value = self.inner.secrets.open(&place(table, number), &value)?;
            Ok(Item { number, open, value })
        })
        .collect()
    }
}

/// Returns the associated data of an item.
fn place(table: Table, number: u64) -> Vec<u8> {
    [b"item", &[table.0][..], &number.to_be_bytes()].concat()
}

fn signed(number: u64) -> Result<i64, DatabaseError> {
    i64::try_from(number)
        .map_err(|_| DatabaseError::Damaged("a number is larger than any that was given".into()))
}

fn after_number(after: Option<u64>) -> Result<i64, DatabaseError> {
    after.map_or(Ok(-1), signed)
}
