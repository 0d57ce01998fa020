//! Copies of sessions in Redis, which all edges share.
//!
//! A copy has the time of Redis at which Postgres was asked, and every reader computes its age from
//! that. So a copy from an old dump, or of an edge with other settings, is valid for no longer than
//! any other. When a session ends, a mark replaces its copy, and no copy overwrites the mark. The
//! mark stays for longer than a copy is valid. So a copy of a row that was read before the end is
//! replaced by the mark, refused because of it, or too old to be valid.

use std::{sync::LazyLock, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use qpq_domain::{AccountId, DeviceId, IdentityKey, StoreId, TokenHash, UnixMillis};
use qpq_ports::{Session, StoreResult};
use redis::{Cmd, Script};

use crate::redis::Redis;

/// Time for which the mark of an ended session stays, and the maximum validity of a copy.
pub(super) const ENDED: Duration = Duration::from_secs(10 * 60);
/// The first byte of a copy. The previous release wrote `S`, and does not accept these copies,
/// since their lengths differ from its own.
const VERSION: &[u8] = &[2];
/// The treatment of a valid copy that exists: it stays, or is replaced.
const KEEP: &[u8] = b"keep";
const REPLACE: &[u8] = b"replace";
/// Maximum concurrent writes.
const KEYS: usize = 64;

static FIND: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../redis/scripts/session_find.lua")));
static FILL: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../redis/scripts/session_fill.lua")));
static TOUCH: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../redis/scripts/session_touch.lua")));

/// The copies in Redis. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct InRedis {
    redis: Redis,
    ttl: Duration,
}

/// The time of Redis when it was asked for a copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct AskedAt(u64);

/// The copy of a session in Redis.
#[derive(Debug)]
pub(super) enum Copy {
    Found { session: Session, age: Duration },
    Ended,
    Absent(AskedAt),
}

/// The outcome of storing a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fill {
    /// The copy is stored, or it was too old.
    Done,
    /// The session has ended since Postgres was asked.
    Ended,
}

impl InRedis {
    pub(super) fn new(redis: Redis, ttl: Duration) -> Self {
        Self { redis, ttl }
    }

    /// Returns the session's copy, if it is of this history.
    pub(super) async fn find(&self, token: &TokenHash, store_id: StoreId) -> StoreResult<Copy> {
        let args = [
            millis(self.ttl),
            Bytes::from_static(VERSION),
            Bytes::copy_from_slice(store_id.as_bytes()),
        ];
        let (kind, millis, copy): (String, u64, Vec<u8>) =
            self.redis.script("session_find", &FIND, &[self.key(token)], &args).await?;
        Ok(match &kind[..] {
            "ended" => Copy::Ended,
            "found" if let Some(session) = decode(&copy) => {
                Copy::Found { session, age: Duration::from_millis(millis) }
            }
            _ => Copy::Absent(AskedAt(millis)),
        })
    }

    /// Stores a copy of the row that Postgres returned after `asked_at`, in the history of
    /// `store_id`.
    pub(super) async fn fill(
        &self,
        token: &TokenHash,
        store_id: StoreId,
        session: &Session,
        asked_at: AskedAt,
    ) -> StoreResult<Fill> {
        self.store(token, store_id, session, asked_at, KEEP).await
    }

    /// Stores a copy of the row in place of any other copy. See [`fill`](Self::fill).
    pub(super) async fn replace(
        &self,
        token: &TokenHash,
        store_id: StoreId,
        session: &Session,
        asked_at: AskedAt,
    ) -> StoreResult<Fill> {
        self.store(token, store_id, session, asked_at, REPLACE).await
    }

    async fn store(
        &self,
        token: &TokenHash,
        store_id: StoreId,
        session: &Session,
        asked_at: AskedAt,
        other: &'static [u8],
    ) -> StoreResult<Fill> {
        let args = [
            asked_at.0.to_string().into(),
            millis(self.ttl),
            Bytes::from_static(VERSION),
            Bytes::copy_from_slice(store_id.as_bytes()),
            encode(session),
            Bytes::from_static(other),
        ];
        let ended: bool =
            self.redis.script("session_fill", &FILL, &[self.key(token)], &args).await?;
        Ok(if ended { Fill::Ended } else { Fill::Done })
    }

    /// Records a use in the copy, if there is one.
    pub(super) async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()> {
        let mut used = BytesMut::with_capacity(16);
        used.put_u64(now.0);
        used.put_u64(expires_at.0);
        let args = [used.freeze(), Bytes::from_static(VERSION)];
        self.redis.script::<u64>("session_touch", &TOUCH, &[self.key(token)], &args).await.map(drop)
    }

    /// Marks the sessions as ended. A session that cannot be marked is valid for as long as its
    /// copy.
    pub(super) async fn ended(&self, tokens: &[TokenHash]) {
        self.each(tokens, |key| {
            let mut set = Cmd::new();
            set.arg("SET").arg(key).arg("E").arg("PX").arg(ENDED.as_millis() as u64);
            set
        })
        .await;
    }

    /// Removes the copies.
    pub(super) async fn drop(&self, tokens: &[TokenHash]) {
        self.each(tokens, |key| {
            let mut unlink = Cmd::new();
            unlink.arg("UNLINK").arg(key);
            unlink
        })
        .await;
    }

    async fn each(&self, tokens: &[TokenHash], command: impl Fn(String) -> Cmd) {
        stream::iter(tokens)
            .for_each_concurrent(KEYS, |token| {
                let command = command(self.key(token));
                async move {
                    // Failures are counted in the metrics of Redis.
                    let _ = self.redis.command::<redis::Value>("session_end", &command).await;
                }
            })
            .await;
    }

    fn key(&self, token: &TokenHash) -> String {
        let (high, low) = token.as_bytes().split_at(16);
        let half = |bytes: &[u8]| u128::from_be_bytes(bytes.try_into().expect("16 bytes"));
        self.redis.key(format_args!("s:{:032x}{:032x}", half(high), half(low)))
    }
}

/// Encodes a session: last_used_at (8 bytes) ‖ expires_at (8) ‖ authenticated_at (8) ‖ account (8)
/// ‖ identity (32) ‖ length of the device (1) ‖ device (0 or 16), big-endian. `session_touch.lua`
/// writes the first two.
fn encode(session: &Session) -> Bytes {
    let Session { account, identity, device, authenticated_at, last_used_at, expires_at } = session;
    let device = device.as_ref().map_or(&[][..], |device| device.as_bytes());
    let mut copy = BytesMut::with_capacity(81);
    copy.put_u64(last_used_at.0);
    copy.put_u64(expires_at.0);
    copy.put_u64(authenticated_at.0);
    copy.put_i64(account.0);
    copy.put_slice(identity.as_bytes());
    copy.put_u8(u8::try_from(device.len()).expect("0 or 16"));
    copy.put_slice(device);
    copy.freeze()
}

fn decode(copy: &[u8]) -> Option<Session> {
    let (last_used_at, rest) = copy.split_first_chunk()?;
    let (expires_at, rest) = rest.split_first_chunk()?;
    let (authenticated_at, rest) = rest.split_first_chunk()?;
    let (account, rest) = rest.split_first_chunk()?;
    let (identity, rest) = rest.split_first_chunk()?;
    let (&length, device) = rest.split_first()?;
    if device.len() != usize::from(length) {
        return None;
    }
    let at = |bytes: &[u8; 8]| UnixMillis(u64::from_be_bytes(*bytes));
    Some(Session {
        account: AccountId(i64::from_be_bytes(*account)),
        identity: IdentityKey::new(*identity),
        device: if device.is_empty() { None } else { Some(DeviceId::try_from(device).ok()?) },
        authenticated_at: at(authenticated_at),
        last_used_at: at(last_used_at),
        expires_at: at(expires_at),
    })
}

fn millis(duration: Duration) -> Bytes {
    duration.as_millis().to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_read_as_it_was_written_and_nothing_else_is() {
        for device in [None, Some(DeviceId::new([0xff; 16]))] {
            let session = Session {
                account: AccountId(7),
                identity: IdentityKey::new([3; 32]),
                device,
                authenticated_at: UnixMillis(1),
                last_used_at: UnixMillis(u64::MAX),
                expires_at: UnixMillis(2),
            };
            let copy = encode(&session);
            assert_eq!(decode(&copy), Some(session));
            let longer = [&copy[..], b"x"].concat();
            assert_eq!(decode(&longer), None);
            for length in 0..copy.len() {
                assert_eq!(decode(&copy[..length]), None, "{length} bytes");
            }
        }
    }
}
