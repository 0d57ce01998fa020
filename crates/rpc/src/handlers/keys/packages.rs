//! KeyPackages: uploading them, checked one by one (300), taking somebody's (301), counting one's
//! own (305).

use std::collections::HashSet;

use bytes::Bytes;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use qpq_mls::key_package;
use qpq_ports::{NewKeyPackage, Stock, Upload, UploadMode};
use qpq_proto::{Method as _, convert, methods, v1};
use sha2::{Digest as _, Sha256};

use super::check_owner;
use crate::{Answered, App, Caller, Cx, Error, Handler, Subject, account_events::AccountEvent};

/// KeyPackages between two chances for others on this worker: two signatures and a hash each, about
/// a millisecond.
const STRIDE: usize = 8;

impl Handler for methods::UploadKeyPackage {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::UploadKeyPackageRequest,
    ) -> Result<Answered<v1::UploadKeyPackageResponse>, Error> {
        check_owner(&caller, &request.identity_key)?;
        let uploads = uploads(cx.app, &request)?;
        let more = u32::try_from(uploads.len() - 1).unwrap_or(u32::MAX);
        cx.charge(Self::INFO.limit, caller.account, more).await?;
        let known = known(cx.app, caller.account, &uploads).await?;
        let packages = check(cx.app, &caller.identity, &uploads, &known, cx.now).await?;
        let mode = if request.replace { UploadMode::Replace } else { UploadMode::Add };
        let stored = cx.app.stores.key_packages.upload(caller.account, packages, mode, cx.now);
        let Stock { available, .. } = match stored.await? {
            Upload::Stored(stock) => stock,
            Upload::GivenOut(index) => {
                let field = uploads.get(index).map_or("package", |upload| upload.field);
                return Err(Error::invalid_package(field, GivenOut));
            }
            Upload::Full => return Err(Error::KeyPackagesFull),
        };
        let fingerprint = if request.package.is_empty() {
            Bytes::new()
        } else {
            Bytes::copy_from_slice(&Sha256::digest(&request.package))
        };
        Ok(v1::UploadKeyPackageResponse { fingerprint, available }.into())
    }
}

impl Handler for methods::FetchKeyPackage {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchKeyPackageRequest,
    ) -> Result<Answered<v1::FetchKeyPackageResponse>, Error> {
        let target = convert::identity_key(&request.identity_key, "identity_key")?;
        cx.limit(Self::INFO.limit, Subject::Target(caller.account, &target)).await?;
        // Whether there is no such account or it has no package left: the answer is the same.
        let Some(taken) = cx.app.stores.key_packages.take(&target, cx.now).await? else {
            return Ok(v1::FetchKeyPackageResponse::default().into());
        };
        cx.app.account_events.publish(&target, AccountEvent::KeyPackageTaken);
        Ok(v1::FetchKeyPackageResponse {
            package: taken.bytes.into(),
            last_resort: taken.last_resort,
        }
        .into())
    }
}

impl Handler for methods::CountKeyPackages {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        _request: v1::CountKeyPackagesRequest,
    ) -> Result<Answered<v1::CountKeyPackagesResponse>, Error> {
        let Stock { available, has_last_resort } =
            cx.app.stores.key_packages.stock(caller.account, cx.now).await?;
        Ok(v1::CountKeyPackagesResponse { available, has_last_resort }.into())
    }
}

/// One package of a request.
struct Uploaded<'a> {
    bytes: &'a Bytes,
    field: &'static str,
    last_resort: bool,
}

/// The store has a package's word that it was given out.
#[derive(Debug, thiserror::Error)]
#[error("the key package was given out before")]
struct GivenOut;

/// All packages of a request, at least one. The flag speaks of `package` alone.
fn uploads<'a>(
    app: &App,
    request: &'a v1::UploadKeyPackageRequest,
) -> Result<Vec<Uploaded<'a>>, Error> {
    let one =
        (!request.package.is_empty() || request.last_resort || request.more_packages.is_empty())
            .then_some(Uploaded {
                bytes: &request.package,
                field: "package",
                last_resort: request.last_resort,
            });
    let more = request.more_packages.iter();
    let more = more.map(|bytes| Uploaded { bytes, field: "more_packages", last_resort: false });
    let uploads: Vec<_> = one.into_iter().chain(more).collect();
    convert::at_most(uploads.len(), app.config.key_packages.max_count as usize, "more_packages")?;
    Ok(uploads)
}

/// The fingerprints of stored packages, where it is worth asking for them: a client that repeats an
/// upload repeats many.
async fn known(
    app: &App,
    owner: AccountId,
    uploads: &[Uploaded<'_>],
) -> Result<HashSet<[u8; 32]>, Error> {
    if uploads.len() < STRIDE {
        return Ok(HashSet::new());
    }
    Ok(app.stores.key_packages.known(owner).await?)
}

/// Checks every package, or says which is bad. The signatures of those that are known were verified
/// when they were stored. The work is done a few at a time, by few calls at a time, so that others
/// get their turn.
async fn check(
    app: &App,
    owner: &IdentityKey,
    uploads: &[Uploaded<'_>],
    known: &HashSet<[u8; 32]>,
    now: UnixMillis,
) -> Result<Vec<NewKeyPackage>, Error> {
    let mut packages = Vec::with_capacity(uploads.len());
    for some in uploads.chunks(STRIDE) {
        let checked = app
            .key_package_gate
            .run(|| some.iter().map(|upload| check_one(app, owner, upload, known, now)).collect());
        let checked: Result<Vec<_>, Error> = checked.await?;
        packages.extend(checked?);
        tokio::task::yield_now().await;
    }
    Ok(packages)
}

fn check_one(
    app: &App,
    owner: &IdentityKey,
    upload: &Uploaded<'_>,
    known: &HashSet<[u8; 32]>,
    now: UnixMillis,
) -> Result<NewKeyPackage, Error> {
    let rejected = |rejected| Error::invalid_package(upload.field, rejected);
    let checked = key_package::inspect(upload.bytes, &app.key_package_policy, owner, now)
        .map_err(rejected)?;
    if !known.contains(&checked.reference) {
        key_package::verify_signatures(upload.bytes).map_err(rejected)?;
    }
    Ok(NewKeyPackage {
        // Of the KeyPackage itself: sent bare and wrapped it is one, and is given out once.
        fingerprint: checked.reference,
        bytes: upload.bytes.to_vec(),
        last_resort: upload.last_resort || checked.last_resort,
        not_before: checked.not_before,
        not_after: checked.not_after,
    })
}
