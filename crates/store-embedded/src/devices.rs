//! Devices in SQLite. A row is one registration. Its number is never used again, so a page that was
//! read by an earlier registration of the same device completes no message.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, DeviceKey, IdentityKey, MAX_DEVICES, Seq, UnixMillis};
use qpq_ports::{
    CertifiedKey, Device, DeviceRegistration, DeviceRevocation, Devices, NewDevice, StoreResult,
    View, key_tombstone,
};
use sqlx::{
    Row as _, SqliteConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

use crate::{
    absence::ConfirmPosition,
    effects::Effects,
    error::{NeverWritten, read_failed},
    messages::remove::{Removal, Selection},
    row::{Columns as _, millis},
    sessions::tokens,
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

#[async_trait]
impl Devices for EmbeddedStore {
    async fn register(&self, device: NewDevice) -> StoreResult<DeviceRegistration> {
        // With a clock that went back, the device would look absent.
        let now = self.memory.clock.bounds(device.now).latest;
        self.writer.run(RegisterDevice { device: NewDevice { now, ..device } }).await
    }

    async fn confirm_position(&self, account: AccountId, device: DeviceId) -> StoreResult<()> {
        self.writer.run(ConfirmPosition { account, device }).await
    }

    async fn list(&self, account: AccountId) -> StoreResult<Vec<Device>> {
        let rows = sqlx::query(LIST).bind(account.0).fetch_all(&self.readers).await;
        rows.and_then(|rows| rows.iter().map(device).collect()).map_err(read_failed)
    }

    async fn revoke(
        &self,
        account: AccountId,
        device: DeviceId,
        now: UnixMillis,
    ) -> StoreResult<DeviceRevocation> {
        let revoke = RevokeDevice {
            account,
            device,
            removed_at: self.memory.clock.bounds(now).latest,
            recent_ids: self.limits.delivery.recent_ids,
        };
        self.writer.run(revoke).await
    }
}

pub(crate) const LIST: &str = "
    SELECT device, name, key, proof, registered_at, last_seen_at FROM device
     WHERE account = ?1 ORDER BY id";

fn device(row: &SqliteRow) -> sqlx::Result<Device> {
    Ok(Device {
        id: row.device("device")?.ok_or(NeverWritten("device"))?,
        name: row.try_get("name")?,
        key: certified_key(row)?,
        registered_at: row.at("registered_at")?,
        last_seen_at: row.at("last_seen_at")?,
    })
}

fn certified_key(row: &SqliteRow) -> sqlx::Result<Option<CertifiedKey>> {
    let Some(key) = row.try_get::<Option<&[u8]>, _>("key")? else { return Ok(None) };
    let key = DeviceKey::try_from(key).map_err(|_| NeverWritten("key"))?;
    let proof = row.try_get::<&[u8], _>("proof")?.try_into().map_err(|_| NeverWritten("proof"))?;
    Ok(Some(CertifiedKey { key, proof }))
}

/// Registers a device, or finds the reason for a refusal.
struct RegisterDevice {
    device: NewDevice,
}

impl Statement for RegisterDevice {
    type Answer = DeviceRegistration;
    const NAME: &'static str = "register device";

    fn bytes(&self) -> usize {
        SMALL + self.device.name.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<DeviceRegistration>> {
        let (registration, readers_changed) = match self.key_of_registered(tx).await? {
            Some(key) if key != self.key() => {
                return Ok(Done::keep(DeviceRegistration::OtherKey));
            }
            Some(_) => {
                self.rename(tx).await?;
                (DeviceRegistration::Repeated, None)
            }
            None => {
                if let Some(refusal) = self.refusal(tx).await? {
                    return Ok(Done::keep(refusal));
                }
                (DeviceRegistration::Registered, Some(self.insert(tx).await?))
            }
        };
        let is_bound = self.bind_session(tx).await?;
        let effects = Effects {
            sessions_changed: is_bound.then_some(self.device.session).into_iter().collect(),
            readers_changed,
            // The first device inherits the messages, and the single reader may no longer read.
            wakes: readers_changed.map(|inbox| (inbox, View::All)).into_iter().collect(),
            ..Effects::default()
        };
        Ok(Done::with(registration, effects))
    }
}

/// The device ?2 of the account ?1.
const FIND: &str = "SELECT key, proof FROM device WHERE account = ?1 AND device = ?2";

const RENAME: &str = "UPDATE device SET name = ?3 WHERE account = ?1 AND device = ?2";

/// Selects whether the key ?3 belongs to another device than ?2 of the account ?1, to an account or
/// to a deleted one, as its tombstone ?4 shows, and the number of the account's devices.
const REFUSAL: &str = "
    SELECT EXISTS (SELECT 1 FROM device_key
                    WHERE key = ?3 AND (account <> ?1 OR device <> ?2))
           OR EXISTS (SELECT 1 FROM account WHERE identity = ?3)
           OR EXISTS (SELECT 1 FROM tombstone WHERE hash = ?4 AND until IS NULL) AS taken,
           (SELECT count(*) FROM device WHERE account = ?1) AS devices";

/// The first device starts at the beginning of the inbox, a later one after the newest message.
const INSERT: &str = "
    INSERT INTO device (account, device, name, key, proof, registered_at, last_seen_at, upto)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6,
            (SELECT CASE devices WHEN 0 THEN 0 ELSE last_seq END FROM inbox WHERE id = ?1))";

const TAKE_KEY: &str =
    "INSERT OR IGNORE INTO device_key (key, account, device) VALUES (?1, ?2, ?3)";

const BIND_SESSION: &str = "
    UPDATE session SET device = ?3 WHERE token = ?1 AND account = ?2 AND device IS NULL";

impl RegisterDevice {
    fn id(&self) -> &[u8] {
        &self.device.device.as_bytes()[..]
    }

    fn key(&self) -> Option<DeviceKey> {
        self.device.key.map(|certified| certified.key)
    }

    /// Returns the key of the device, if the device is registered.
    async fn key_of_registered(
        &self,
        tx: &mut SqliteConnection,
    ) -> sqlx::Result<Option<Option<DeviceKey>>> {
        let query = sqlx::query(FIND).bind(self.device.account.0).bind(self.id());
        let Some(row) = query.fetch_optional(tx).await? else { return Ok(None) };
        Ok(Some(certified_key(&row)?.map(|certified| certified.key)))
    }

    async fn rename(&self, tx: &mut SqliteConnection) -> sqlx::Result<()> {
        let query = sqlx::query(RENAME).bind(self.device.account.0).bind(self.id());
        query.bind(&self.device.name).execute(tx).await.map(drop)
    }

    async fn refusal(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<DeviceRegistration>> {
        let key = self.key();
        let row = sqlx::query(REFUSAL)
            .bind(self.device.account.0)
            .bind(self.id())
            .bind(key.as_ref().map(|key| &key.as_bytes()[..]))
            .bind(key.as_ref().map(|key| key_tombstone(key.as_bytes())))
            .fetch_one(tx)
            .await?;
        Ok(if row.try_get("taken")? {
            Some(DeviceRegistration::KeyTaken)
        } else if row.unsigned("devices")? >= MAX_DEVICES as u64 {
            Some(DeviceRegistration::Full)
        } else {
            None
        })
    }

    /// Inserts the device. Returns the identity key of the account.
    async fn insert(&self, tx: &mut SqliteConnection) -> sqlx::Result<IdentityKey> {
        let NewDevice { account, name, key, now, .. } = &self.device;
        sqlx::query(INSERT)
            .bind(account.0)
            .bind(self.id())
            .bind(name)
            .bind(key.as_ref().map(|certified| &certified.key.as_bytes()[..]))
            .bind(key.as_ref().map(|certified| &certified.proof[..]))
            .bind(millis(*now))
            .execute(&mut *tx)
            .await?;
        if let Some(certified) = key {
            let query = sqlx::query(TAKE_KEY).bind(&certified.key.as_bytes()[..]);
            query.bind(account.0).bind(self.id()).execute(&mut *tx).await?;
        }
        let query = sqlx::query("SELECT identity FROM account WHERE id = ?1").bind(account.0);
        query.fetch_one(tx).await?.identity("identity")
    }

    /// Binds the session to the device if the session has none. Returns whether it was bound.
    async fn bind_session(&self, tx: &mut SqliteConnection) -> sqlx::Result<bool> {
        let NewDevice { account, session, .. } = &self.device;
        let query = sqlx::query(BIND_SESSION).bind(&session.as_bytes()[..]);
        let bound = query.bind(account.0).bind(self.id()).execute(tx).await?;
        Ok(bound.rows_affected() > 0)
    }
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Removes a device, its sessions, its KeyPackages, and the messages that waited for it alone.
struct RevokeDevice {
    account: AccountId,
    device: DeviceId,
    removed_at: UnixMillis,
    recent_ids: Duration,
}

const DELETE: &str = "
    DELETE FROM device WHERE account = ?1 AND device = ?2
    RETURNING upto, (SELECT identity FROM account WHERE id = ?1) AS identity, key IS NULL AS keyless";

const END_SESSIONS: &str = "DELETE FROM session WHERE account = ?1 AND device = ?2 RETURNING token";

const DELETE_PACKAGES: &str = "DELETE FROM key_package WHERE owner = ?1 AND device = ?2";

/// Deletes the packages of the account itself, if no device without a key of its own is left.
const DELETE_OWN_PACKAGES: &str = "
    DELETE FROM key_package WHERE owner = ?1 AND device IS NULL
       AND NOT EXISTS (SELECT 1 FROM device WHERE account = ?1 AND key IS NULL)";

impl Statement for RevokeDevice {
    type Answer = DeviceRevocation;
    const NAME: &'static str = "revoke device";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<DeviceRevocation>> {
        let row = self.query(DELETE).fetch_optional(&mut *tx).await?;
        let Some(row) = row else { return Ok(Done::keep(DeviceRevocation::NotFound)) };
        let inbox = row.identity("identity")?;
        let sessions = tokens(&self.query(END_SESSIONS).fetch_all(&mut *tx).await?)?;
        self.query(DELETE_PACKAGES).execute(&mut *tx).await?;
        if row.try_get("keyless")? {
            self.query(DELETE_OWN_PACKAGES).execute(&mut *tx).await?;
        }
        self.remove_unread(tx, row.seq("upto")?).await?;
        let ended_sessions = u32::try_from(sessions.len()).unwrap_or(u32::MAX);
        let effects = Effects {
            sessions_changed: sessions,
            readers_changed: Some(inbox),
            // The single reader may read the messages that the last device has left.
            wakes: vec![(inbox, View::All)],
            ..Effects::default()
        };
        Ok(Done::with(DeviceRevocation::Revoked { ended_sessions }, effects))
    }
}

impl RevokeDevice {
    fn query(&self, sql: &'static str) -> SqliteQuery<'_> {
        sqlx::query(sql).bind(self.account.0).bind(&self.device.as_bytes()[..])
    }

    /// Removes the messages that waited for the device alone, unless it was the last device: then
    /// they wait for the single reader.
    async fn remove_unread(&self, tx: &mut SqliteConnection, after: Seq) -> sqlx::Result<()> {
        let inbox = self.account.0;
        let devices: i64 = sqlx::query_scalar("SELECT devices FROM inbox WHERE id = ?1")
            .bind(inbox)
            .fetch_one(&mut *tx)
            .await?;
        if devices == 0 {
            return Ok(());
        }
        let removal = Removal {
            selection: Selection::AllUnread { inbox, after, to: Seq(u64::MAX) },
            at: self.removed_at,
            recent_ids: self.recent_ids,
        };
        removal.run(tx).await.map(drop)
    }
}

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 11] = [
    LIST,
    FIND,
    RENAME,
    REFUSAL,
    INSERT,
    TAKE_KEY,
    BIND_SESSION,
    DELETE,
    END_SESSIONS,
    DELETE_PACKAGES,
    DELETE_OWN_PACKAGES,
];
