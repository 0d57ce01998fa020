//! The rows with the bytes of uploads, and of blobs that stay in Postgres.
//!
//! The rows of an object follow one another. A row that is smaller than [`SMALL`] together with the
//! next chunk receives that chunk, so that small chunks do not become many rows.

use bytes::{Bytes, BytesMut};
use sqlx::{PgConnection, Row as _};

use crate::postgres::{Repeat, Scope, Statement, row::number};

/// Maximum size of a row that is made of several chunks.
const SMALL: usize = 64 << 10;

/// Maximum rows of one page. A row has at most 1 MiB.
const PAGE: i64 = 8;

/// The rows with bytes from $2 up to $3.
const OVERLAPPING: &str = "
    SELECT start, bytes FROM blob_chunk
     WHERE object = $1 AND start < $3
       AND start >= coalesce((SELECT max(start) FROM blob_chunk
                               WHERE object = $1 AND start <= $2), 0)
     ORDER BY start LIMIT $4";

const APPEND: &str = "
    UPDATE blob_chunk SET bytes = bytes || $2
     WHERE object = $1
       AND start = (SELECT max(start) FROM blob_chunk WHERE object = $1)
       AND octet_length(bytes) + octet_length($2) <= $3";

const INSERT: &str = "INSERT INTO blob_chunk (object, start, bytes) VALUES ($1, $2, $3)";

const REMOVE: &str = "DELETE FROM blob_chunk WHERE object = $1";

/// Adds bytes at the end of an object, whose upload is locked.
pub(super) async fn append(
    connection: &mut PgConnection,
    object: &str,
    end: u64,
    bytes: &[u8],
) -> sqlx::Result<()> {
    if bytes.len() < SMALL {
        let append = sqlx::query(APPEND).bind(object).bind(bytes).bind(SMALL as i32);
        if append.execute(&mut *connection).await?.rows_affected() > 0 {
            return Ok(());
        }
    }
    let insert = sqlx::query(INSERT).bind(object).bind(number(end)).bind(bytes);
    insert.execute(connection).await.map(drop)
}

/// Removes the bytes of an object.
pub(super) async fn remove(connection: &mut PgConnection, object: &str) -> sqlx::Result<()> {
    sqlx::query(REMOVE).bind(object).execute(connection).await.map(drop)
}

/// Reads `length` bytes from `offset` on. Fewer, if a part is missing.
pub(super) async fn read(
    connection: &mut PgConnection,
    object: &str,
    offset: u64,
    length: u64,
) -> sqlx::Result<Bytes> {
    let end = offset + length;
    let mut found = BytesMut::with_capacity(usize::try_from(length).unwrap_or_default());
    loop {
        let from = offset + found.len() as u64;
        if from >= end {
            break;
        }
        let rows = sqlx::query(OVERLAPPING)
            .bind(object)
            .bind(number(from))
            .bind(number(end))
            .bind(PAGE)
            .fetch_all(&mut *connection)
            .await?;
        let before = found.len();
        for row in rows {
            let (start, bytes): (i64, &[u8]) = (row.try_get("start")?, row.try_get("bytes")?);
            let begin = (offset + found.len() as u64).saturating_sub(start.unsigned_abs());
            let stop = (end - start.unsigned_abs()).min(bytes.len() as u64);
            let range = usize::try_from(begin).ok().zip(usize::try_from(stop).ok());
            let part = range.and_then(|(begin, stop)| bytes.get(begin..stop));
            found.extend_from_slice(part.unwrap_or_default());
        }
        if found.len() == before {
            break;
        }
    }
    Ok(found.freeze())
}

/// Reads a part of an object that nothing changes any more.
pub(super) struct Read<'a> {
    pub(super) object: &'a str,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Statement for Read<'_> {
    type Output = Bytes;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "read_blob"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Bytes> {
        read(connection, self.object, self.offset, self.length).await
    }
}
