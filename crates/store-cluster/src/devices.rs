//! Devices in Postgres, and the changes of a registration or a revocation to the inbox, the
//! sessions and the KeyPackages of the account.
//!
//! Both lock the inbox's head first, by a separate statement, as does every transaction that
//! changes the readers of a message. So each message is accepted either before or after a
//! registration, and each page is completed either before or after a revocation.

use std::{
    collections::{HashMap, HashSet},
    mem,
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{AccountId, DeviceId, DeviceKey, IdentityKey, MAX_DEVICES, TokenHash, UnixMillis};
use qpq_ports::{
    CertifiedKey, Device, DeviceRegistration, DeviceRevocation, Devices, NewDevice, StoreError,
    StoreResult,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    effects::{Accepted, Effects, ToInbox},
    error::NeverWritten,
    inboxes::remove_spent,
    keys,
    postgres::{
        OlderEdges, Repeat, Scope, Statement, mark_cluster,
        row::{Columns as _, millis},
    },
    sessions::tokens,
    store::Inner,
};

const LOCK: &str = "
    SELECT i.devices, i.last_seq, a.identity FROM inbox i JOIN account a ON a.id = i.id
     WHERE i.id = $1 FOR NO KEY UPDATE OF i";

const LIST: &str = "
    SELECT device, name, key, proof, registered_at, last_seen_at FROM device
     WHERE account = $1 ORDER BY id";

const FIND: &str = "SELECT key FROM device WHERE account = $1 AND device = $2";
const RENAME: &str =
    "UPDATE device SET name = $3 WHERE account = $1 AND device = $2 AND name <> $3";

/// Clears `position_lost`. Needs no lock of the head, because no other statement clears it.
const CONFIRM: &str = "
    UPDATE device SET position_lost = false WHERE account = $1 AND device = $2 AND position_lost";

const CLAIM_KEY: &str = "
    INSERT INTO device_key (key, account, device) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";

/// Returns whether another device or an account has or had the key. A separate statement, because
/// it sees the row that the claim conflicts with.
const IS_KEY_OF_OTHER: &str = "
    SELECT EXISTS (SELECT 1 FROM device_key WHERE key = $1 AND (account, device) <> ($2, $3))
        OR EXISTS (SELECT 1 FROM account WHERE identity = $1)
        OR EXISTS (SELECT 1 FROM tombstone WHERE hash = sha256('qpq/key/1'::bytea || $1))";

const INSERT: &str = "
    INSERT INTO device (account, device, name, key, proof, registered_at, last_seen_at, upto)
    VALUES ($1, $2, $3, $4, $5, $6, $6, $7)";
const COUNT_UP: &str = "UPDATE inbox SET devices = devices + 1 WHERE id = $1";

const BIND: &str = "
    UPDATE session SET device = $2 WHERE token = $1 AND account = $3 AND device IS NULL";

const REMOVE: &str =
    "DELETE FROM device WHERE account = $1 AND device = $2 RETURNING upto, key IS NULL AS keyless";
const REMOVE_DONE: &str = "DELETE FROM device_done WHERE inbox = $1 AND device = $2";

/// After the last device, the single reader continues with the remaining messages. The queue of
/// the single reader in Redis may be from before the first registration. Incrementing the removals
/// of the inbox makes that queue outdated.
const COUNT_DOWN: &str = "
    UPDATE inbox SET devices = devices - 1, removals = removals + (devices = 1)::int
     WHERE id = $1 RETURNING devices, last_seq";

const END_SESSIONS: &str = "DELETE FROM session WHERE account = $1 AND device = $2 RETURNING token";

#[async_trait]
impl Devices for ClusterStore {
    async fn register(&self, mut device: NewDevice) -> StoreResult<DeviceRegistration> {
        // If the clock of the caller is behind, the device would count as absent.
        let time = &self.inner.time;
        device.now = time.bounds(device.now, time.postgres()).latest;
        let store = self.clone();
        // A separate task, so that the copies of the session are renewed even if the caller is
        // dropped.
        let registering = tokio::spawn(async move {
            let Inner { database, applier, opaque_setup, .. } = &*store.inner;
            let register = Register { device: &device, opaque_setup };
            let (registration, inbox) = database.run(&register).await?;
            if let DeviceRegistration::Registered | DeviceRegistration::Repeated = registration {
                applier.sessions.changed(&store.inner, &device.session).await;
            }
            if registration == DeviceRegistration::Registered {
                store.inner.readers_changed(inbox).await;
            }
            Ok(registration)
        });
        registering.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }

    async fn confirm_position(&self, account: AccountId, device: DeviceId) -> StoreResult<()> {
        Ok(self.inner.database.run(&ConfirmPosition { account, device }).await?)
    }

    async fn list(&self, account: AccountId) -> StoreResult<Vec<Device>> {
        Ok(self.inner.database.run(&ListDevices(account)).await?)
    }

    async fn revoke(
        &self,
        account: AccountId,
        device: DeviceId,
        now: UnixMillis,
    ) -> StoreResult<DeviceRevocation> {
        let store = self.clone();
        let revoking = tokio::spawn(async move {
            let Inner { database, applier, limits, .. } = &*store.inner;
            let (recent_ids, revoked) = (limits.delivery.recent_ids, Mutex::default());
            let revoke = Revoke { account, device, now, recent_ids, revoked };
            let outcome = database.run(&revoke).await;
            let Revoked { found, inbox, tokens } = mem::take(&mut *revoke.revoked.lock());
            let ended_sessions: Vec<_> = tokens.into_iter().collect();
            match outcome {
                Ok(()) if found => {
                    let count = u32::try_from(ended_sessions.len()).unwrap_or(u32::MAX);
                    applier.apply(Effects { ended_sessions, ..Effects::default() }).await;
                    if let Some(inbox) = inbox {
                        store.inner.readers_changed(inbox).await;
                    }
                    Ok(DeviceRevocation::Revoked { ended_sessions: count })
                }
                Ok(()) => Ok(DeviceRevocation::NotFound),
                Err(error) => {
                    applier.sessions.uncertain(&ended_sessions).await;
                    Err(error.into())
                }
            }
        });
        revoking.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }
}

impl Inner {
    /// Wakes the calls that wait for an inbox, at every edge, because messages that other readers
    /// had leased may be visible to them now.
    pub(crate) async fn readers_changed(&self, inbox: IdentityKey) {
        let nothing = ToInbox { devices: Some(Vec::new()), messages: Vec::new() };
        let inboxes = HashMap::from([(inbox, nothing)]);
        let accepted = Some(Accepted { store_id: self.history.id(), inboxes });
        self.applier.apply(Effects { accepted, ..Effects::default() }).await;
    }
}

struct ConfirmPosition {
    account: AccountId,
    device: DeviceId,
}

impl Statement for ConfirmPosition {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "confirm_position"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let query = sqlx::query(CONFIRM).bind(self.account.0).bind(&self.device.as_bytes()[..]);
        query.execute(connection).await.map(drop)
    }
}

struct ListDevices(AccountId);

impl Statement for ListDevices {
    type Output = Vec<Device>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "devices"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<Device>> {
        let rows = sqlx::query(LIST).bind(self.0.0).fetch_all(connection).await?;
        rows.iter().map(device).collect()
    }
}

struct Register<'a> {
    device: &'a NewDevice,
    opaque_setup: &'a [u8; 32],
}

impl Statement for Register<'_> {
    /// The outcome, and the inbox.
    type Output = (DeviceRegistration, IdentityKey);

    /// A repeat finds the device of the first attempt.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "register_device"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let (registration, inbox) = register(connection, self).await?;
        if let DeviceRegistration::Registered | DeviceRegistration::Repeated = registration {
            let NewDevice { account, device, session, .. } = self.device;
            sqlx::query(BIND)
                .bind(&session.as_bytes()[..])
                .bind(&device.as_bytes()[..])
                .bind(account.0)
                .execute(connection)
                .await?;
        }
        Ok((registration, inbox))
    }
}

async fn register(
    connection: &mut PgConnection,
    register: &Register<'_>,
) -> sqlx::Result<(DeviceRegistration, IdentityKey)> {
    let account = register.device.account;
    let head = sqlx::query(LOCK).bind(account.0).fetch_one(&mut *connection).await?;
    let registration = register_in(connection, &head, register).await?;
    Ok((registration, head.identity("identity")?))
}

/// Registers a device in an inbox whose head is locked.
async fn register_in(
    connection: &mut PgConnection,
    head: &PgRow,
    Register { device: new, opaque_setup }: &Register<'_>,
) -> sqlx::Result<DeviceRegistration> {
    let NewDevice { account, device, name, key, now, .. } = new;
    let (id, own_key) = (&device.as_bytes()[..], key.as_ref().map(|own| &own.key.as_bytes()[..]));
    let (devices, last_seq): (i16, i64) = (head.try_get("devices")?, head.try_get("last_seq")?);
    let found: Option<Option<Vec<u8>>> =
        sqlx::query_scalar(FIND).bind(account.0).bind(id).fetch_optional(&mut *connection).await?;
    if let Some(found) = found {
        if found.as_deref() != own_key {
            return Ok(DeviceRegistration::OtherKey);
        }
        let rename = sqlx::query(RENAME).bind(account.0).bind(id).bind(name);
        rename.execute(connection).await?;
        return Ok(DeviceRegistration::Repeated);
    }
    if usize::try_from(devices).unwrap_or_default() >= MAX_DEVICES {
        return Ok(DeviceRegistration::Full);
    }
    if let Err(OlderEdges) = mark_cluster(connection, opaque_setup).await? {
        return Ok(DeviceRegistration::OlderEdges);
    }
    if let Some(key) = own_key
        && !claim(connection, key, new).await?
    {
        return Ok(DeviceRegistration::KeyTaken);
    }
    sqlx::query(INSERT)
        .bind(account.0)
        .bind(id)
        .bind(name)
        .bind(own_key)
        .bind(key.as_ref().map(|own| &own.proof[..]))
        .bind(millis(*now))
        // The first device inherits the messages of the single reader.
        .bind(if devices == 0 { 0 } else { last_seq })
        .execute(&mut *connection)
        .await?;
    sqlx::query(COUNT_UP).bind(account.0).execute(connection).await?;
    Ok(DeviceRegistration::Registered)
}

/// Stores a key as the device's own. Returns `false` if it belongs to another device or is an
/// identity key.
async fn claim(connection: &mut PgConnection, key: &[u8], new: &NewDevice) -> sqlx::Result<bool> {
    let of_device = |sql| {
        let query = sqlx::query(sql).bind(key.to_vec()).bind(new.account.0);
        query.bind(new.device.as_bytes().to_vec())
    };
    // This check precedes the insert, so that a refusal writes nothing. A claim that another
    // transaction commits in between is found by the check below.
    let is_taken = of_device(IS_KEY_OF_OTHER).fetch_one(&mut *connection).await?;
    if is_taken.try_get(0)? {
        return Ok(false);
    }
    if of_device(CLAIM_KEY).execute(&mut *connection).await?.rows_affected() > 0 {
        return Ok(true);
    }
    let is_taken: bool = of_device(IS_KEY_OF_OTHER).fetch_one(connection).await?.try_get(0)?;
    Ok(!is_taken)
}

/// The results of all attempts at a revocation. An attempt whose commit was not answered may have
/// succeeded.
#[derive(Default)]
struct Revoked {
    found: bool,
    inbox: Option<IdentityKey>,
    tokens: HashSet<TokenHash>,
}

struct Revoke {
    account: AccountId,
    device: DeviceId,
    now: UnixMillis,
    recent_ids: Duration,
    revoked: Mutex<Revoked>,
}

impl Statement for Revoke {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "revoke_device"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let &Self { account, device, now, recent_ids, .. } = self;
        let of_device = |sql| sqlx::query(sql).bind(account.0).bind(device.as_bytes().to_vec());
        let head = sqlx::query(LOCK).bind(account.0).fetch_optional(&mut *connection).await?;
        let Some(removed) = of_device(REMOVE).fetch_optional(&mut *connection).await? else {
            return Ok(());
        };
        let (upto, keyless): (i64, bool) = (removed.try_get("upto")?, removed.try_get("keyless")?);
        of_device(REMOVE_DONE).execute(&mut *connection).await?;
        let (devices, last_seq): (i16, i64) =
            sqlx::query_as(COUNT_DOWN).bind(account.0).fetch_one(&mut *connection).await?;
        if devices > 0 {
            remove_spent(connection, account.0, (upto, last_seq), now, recent_ids).await?;
        }
        keys::remove_of_device(connection, account, &device, keyless).await?;
        let ended = tokens(&of_device(END_SESSIONS).fetch_all(connection).await?)?;
        let mut revoked = self.revoked.lock();
        revoked.found = true;
        revoked.inbox = head.map(|head| head.identity("identity")).transpose()?;
        revoked.tokens.extend(ended);
        Ok(())
    }
}

fn device(row: &PgRow) -> sqlx::Result<Device> {
    Ok(Device {
        id: row.device("device")?.ok_or(NeverWritten("device"))?,
        name: row.try_get("name")?,
        key: certified_key(row)?,
        registered_at: row.at("registered_at")?,
        last_seen_at: row.at("last_seen_at")?,
    })
}

fn certified_key(row: &PgRow) -> sqlx::Result<Option<CertifiedKey>> {
    let proof = row.signature("proof")?;
    Ok(match proof {
        Some(proof) => Some(CertifiedKey { key: DeviceKey::new(row.hash("key")?), proof }),
        None => None,
    })
}
