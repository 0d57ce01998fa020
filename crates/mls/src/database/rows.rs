//! Rows, found by a key or listed by a lane; and the set of noted digests.

use rusqlite::{OptionalExtension as _, params};

use super::{
    Database, DatabaseError, Table, Value,
    seal::{Name, NameKind},
};

/// The table number from which the names of digests are derived.
const DIGESTS: Table = Table::new(0);

impl Database {
    /// Returns the value of `key`.
    pub fn get(&self, table: Table, key: &[u8]) -> Result<Option<Value>, DatabaseError> {
        let name = self.key(table, key);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT value FROM rows WHERE tab = ?1 AND key = ?2")?;
        let sealed: Option<Vec<u8>> =
            statement.query_row(params![table.0, name], |row| row.get(0)).optional()?;
        sealed.map(|sealed| self.inner.secrets.open(&place(table, &name), &sealed)).transpose()
    }

    /// Sets the value of `key`, and the lane that it is listed in.
    pub fn put(
        &self,
        table: Table,
        key: &[u8],
        lane: Option<&[u8]>,
        value: &[u8],
    ) -> Result<(), DatabaseError> {
        let name = self.key(table, key);
        let lane = lane.map(|lane| self.lane(table, lane));
        let sealed = self.inner.secrets.seal(&place(table, &name), value);
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(
            "INSERT INTO rows (tab, key, lane, value) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (tab, key) DO UPDATE SET lane = excluded.lane, value = excluded.value",
        )?;
        statement.execute(params![table.0, name, lane, sealed])?;
        Ok(())
    }

    /// Removes `key`; returns whether it was there.
    pub fn delete(&self, table: Table, key: &[u8]) -> Result<bool, DatabaseError> {
        let name = self.key(table, key);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("DELETE FROM rows WHERE tab = ?1 AND key = ?2")?;
        Ok(statement.execute(params![table.0, name])? > 0)
    }

    /// Returns every value of a lane.
    pub fn in_lane(&self, table: Table, lane: &[u8]) -> Result<Vec<Value>, DatabaseError> {
        let lane = self.lane(table, lane);
        self.select("SELECT key, value FROM rows WHERE tab = ?1 AND lane = ?2", table, Some(lane))
    }

    /// Returns every value of a table.
    pub fn all(&self, table: Table) -> Result<Vec<Value>, DatabaseError> {
        self.select("SELECT key, value FROM rows WHERE tab = ?1 AND ?2 IS NULL", table, None)
    }

    /// Returns the number of rows of a lane.
    pub fn count_in_lane(&self, table: Table, lane: &[u8]) -> Result<u64, DatabaseError> {
        let lane = self.lane(table, lane);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT count(*) FROM rows WHERE tab = ?1 AND lane = ?2")?;
        let count = |row: &rusqlite::Row<'_>| row.get(0).map(i64::cast_unsigned);
        Ok(statement.query_row(params![table.0, lane], count)?)
    }

    /// Removes the rows of a table whose value meets a condition; returns their number.
    pub fn delete_where(
        &self,
        table: Table,
        condition: impl Fn(&[u8]) -> bool,
    ) -> Result<usize, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT key, value FROM rows WHERE tab = ?1")?;
        let rows = statement
            .query_map([table.0], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, Vec<u8>>(1)?)))?
            .collect::<Result<Vec<_>, _>>()?;
        let mut delete =
            connection.prepare_cached("DELETE FROM rows WHERE tab = ?1 AND key = ?2")?;
        let mut deleted = 0;
        for (name, sealed) in rows {
            if condition(&self.inner.secrets.open(&place(table, &name), &sealed)?) {
                deleted += delete.execute(params![table.0, name])?;
            }
        }
        Ok(deleted)
    }

    /// Returns the number of rows of a table.
    pub fn count(&self, table: Table) -> Result<u64, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT count(*) FROM rows WHERE tab = ?1")?;
        Ok(statement.query_row([table.0], |row| row.get(0).map(i64::cast_unsigned))?)
    }

    fn select(
        &self,
        sql: &str,
        table: Table,
        lane: Option<Name>,
    ) -> Result<Vec<Value>, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(sql)?;
        let rows = statement.query_map(params![table.0, lane], |row| {
            Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, Vec<u8>>(1)?))
        })?;
        rows.map(|row| {
            let (name, sealed) = row?;
            self.inner.secrets.open(&place(table, &name), &sealed)
        })
        .collect()
    }

    /// Removes every row of a lane.
    pub fn delete_lane(&self, table: Table, lane: &[u8]) -> Result<(), DatabaseError> {
        let lane = self.lane(table, lane);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("DELETE FROM rows WHERE tab = ?1 AND lane = ?2")?;
        statement.execute(params![table.0, lane])?;
        Ok(())
    }

    /// Notes a digest until [`Database::forget_digests`] is called for a later day; returns whether
    /// it is new.
    pub fn note_digest(&self, digest: &[u8; 32], day: u64) -> Result<bool, DatabaseError> {
        let name = self.inner.secrets.name(DIGESTS, NameKind::Digest, digest);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("INSERT OR IGNORE INTO digests VALUES (?1, ?2)")?;
        Ok(statement.execute(params![name, i64::try_from(day).unwrap_or(i64::MAX)])? > 0)
    }

    /// Returns whether a digest was noted.
    pub fn knows_digest(&self, digest: &[u8; 32]) -> Result<bool, DatabaseError> {
        let name = self.inner.secrets.name(DIGESTS, NameKind::Digest, digest);
        let connection = self.inner.connection.lock();
        let mut statement =
            connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM digests WHERE digest = ?1)")?;
        Ok(statement.query_row([name], |row| row.get(0))?)
    }

    /// Forgets up to `limit` digests that were noted before `day`; returns their number.
    pub fn forget_digests(&self, before_day: u64, limit: u32) -> Result<usize, DatabaseError> {
        let connection = self.inner.connection.lock();
        let mut statement = connection.prepare_cached(
            "DELETE FROM digests WHERE digest IN
             (SELECT digest FROM digests WHERE day < ?1 ORDER BY day LIMIT ?2)",
        )?;
        Ok(statement.execute(params![i64::try_from(before_day).unwrap_or(i64::MAX), limit])?)
    }

    pub(super) fn key(&self, table: Table, key: &[u8]) -> Name {
        self.inner.secrets.name(table, NameKind::Key, key)
    }

    pub(super) fn lane(&self, table: Table, lane: &[u8]) -> Name {
        self.inner.secrets.name(table, NameKind::Lane, lane)
    }
}

/// Returns the associated data of a row.
fn place(table: Table, name: &[u8]) -> Vec<u8> {
    [b"row", &[table.0][..], name].concat()
}
