//! Takes of KeyPackages: one package of an account, or one of each of its devices.

use qpq_domain::{DeviceId, IdentityKey, UnixMillis};
use qpq_ports::TakenKeyPackage;
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use super::alive;
use crate::{
    error::NeverWritten,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
};

/// Takes the oldest package that no other transaction is taking. A locked package is skipped,
/// because the transaction that locked it is about to take it. If that transaction fails, a later
/// package or the last resort was taken instead, which is harmless. The condition is `=` and not
/// `IN`, because a sub-select that is planned as a join may lock and take more than one row.
macro_rules! take {
    ($of:literal) => {
        concat!(
            "WITH taken AS (
                DELETE FROM key_package WHERE id = (
                    SELECT k.id FROM account a JOIN key_package k ON k.owner = a.id
                     WHERE a.identity = $1 AND NOT k.last_resort AND ",
            alive!(),
            $of,
            "        ORDER BY k.id LIMIT 1 FOR UPDATE OF k SKIP LOCKED)
                RETURNING owner, fingerprint, not_after, bytes),
            given AS (
                INSERT INTO key_package_given (owner, fingerprint, not_after)
                SELECT owner, fingerprint, not_after FROM taken ON CONFLICT DO NOTHING)
            SELECT bytes FROM taken"
        )
    };
}

/// Returns a last-resort package, and records it as given, so that it cannot be uploaded again
/// after a newer one has replaced it. The lock prevents a replacement and a new upload before that
/// is recorded. During a replacement the statement waits, and returns the newer package.
macro_rules! take_last_resort {
    ($of:literal) => {
        concat!(
            "WITH shown AS (
                SELECT k.owner, k.fingerprint, k.not_after, k.bytes
                  FROM account a JOIN key_package k ON k.owner = a.id
                 WHERE a.identity = $1 AND k.last_resort AND ",
            alive!(),
            $of,
            "    ORDER BY k.id LIMIT 1 FOR KEY SHARE OF k),
            given AS (
                INSERT INTO key_package_given (owner, fingerprint, not_after)
                SELECT owner, fingerprint, not_after FROM shown ON CONFLICT DO NOTHING)
            SELECT bytes FROM shown"
        )
    };
}

const TAKE: &str = take!("");
const TAKE_LAST_RESORT: &str = take_last_resort!("");
/// $3 the device, $4 true if the device uses the packages of the account, too.
const TAKE_OF_DEVICE: &str = take!(" AND (k.device = $3 OR $4 AND k.device IS NULL) ");
const TAKE_LAST_RESORT_OF_DEVICE: &str =
    take_last_resort!(" AND (k.device = $3 OR $4 AND k.device IS NULL) ");

const DEVICES: &str = "
    SELECT d.device, d.key IS NULL AS keyless
      FROM account a JOIN device d ON d.account = a.id WHERE a.identity = $1 ORDER BY d.id";

/// Waits for an upload of $1 that is not committed yet.
const AFTER_UPLOAD: &str = "SELECT FROM account WHERE identity = $1 FOR SHARE";

/// Takes a package of the account, or one of each of its devices.
pub(super) struct TakePackages<'a> {
    pub(super) target: &'a IdentityKey,
    pub(super) owner: TakeOwner,
    pub(super) now: UnixMillis,
}

/// The owner of the packages to take.
#[derive(Clone, Copy)]
pub(super) enum TakeOwner {
    /// The account, including all of its devices: one package.
    Account,
    /// Each device: one package of each.
    EachDevice,
}

impl Statement for TakePackages<'_> {
    /// The packages, in the order of the devices.
    type Output = Vec<(Option<DeviceId>, Option<TakenKeyPackage>)>;

    const REPEAT: Repeat = Repeat::Never;
    /// A transaction, so that a dead connection is detected before a package can have been taken.
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        match self.owner {
            TakeOwner::Account => "take_key_package",
            TakeOwner::EachDevice => "take_key_packages",
        }
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let &Self { target, owner, now } = self;
        let signers = match owner {
            TakeOwner::Account => vec![None],
            TakeOwner::EachDevice => devices(connection, target).await?,
        };
        let mut packages = Vec::with_capacity(signers.len());
        for signer in &signers {
            let package = take(connection, target, signer.as_ref(), now).await?;
            packages.push((signer.as_ref().map(|signer| signer.device), package));
        }
        if packages.iter().any(|(_, package)| package.is_none()) {
            after_upload(connection, target).await?;
        }
        for ((_, package), signer) in packages.iter_mut().zip(&signers) {
            if package.is_none() {
                *package = take(connection, target, signer.as_ref(), now).await?;
            }
        }
        Ok(packages)
    }
}

async fn devices(
    connection: &mut PgConnection,
    target: &IdentityKey,
) -> sqlx::Result<Vec<Option<Signer>>> {
    let rows = sqlx::query(DEVICES).bind(&target.as_bytes()[..]).fetch_all(connection).await?;
    rows.iter().map(|row| signer(row).map(Some)).collect()
}

/// A device, and whether the identity key signs its packages.
struct Signer {
    device: DeviceId,
    is_keyless: bool,
}

fn signer(row: &PgRow) -> sqlx::Result<Signer> {
    let device = row.device("device")?.ok_or(NeverWritten("device"))?;
    Ok(Signer { device, is_keyless: row.try_get("keyless")? })
}

/// Waits for a concurrent upload of the account, which may be replacing all packages. The new
/// packages are visible once the upload has committed.
async fn after_upload(connection: &mut PgConnection, target: &IdentityKey) -> sqlx::Result<()> {
    let query = sqlx::query(AFTER_UPLOAD).bind(&target.as_bytes()[..]);
    query.execute(connection).await.map(drop)
}

/// Takes a package of the device `of`, or any package of the account.
async fn take(
    connection: &mut PgConnection,
    target: &IdentityKey,
    of: Option<&Signer>,
    now: UnixMillis,
) -> sqlx::Result<Option<TakenKeyPackage>> {
    let [single, last] = match of {
        None => [TAKE, TAKE_LAST_RESORT],
        Some(_) => [TAKE_OF_DEVICE, TAKE_LAST_RESORT_OF_DEVICE],
    };
    for (sql, last_resort) in [(single, false), (last, true)] {
        let mut query = sqlx::query_scalar(sql).bind(&target.as_bytes()[..]).bind(millis(now));
        if let Some(Signer { device, is_keyless }) = of {
            query = query.bind(&device.as_bytes()[..]).bind(is_keyless);
        }
        let bytes: Option<Vec<u8>> = query.fetch_optional(&mut *connection).await?;
        if let Some(bytes) = bytes {
            return Ok(Some(TakenKeyPackage { bytes, last_resort }));
        }
    }
    Ok(None)
}
