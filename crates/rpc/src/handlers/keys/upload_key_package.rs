//! UploadKeyPackage (300): checks and stores KeyPackages.

use std::collections::HashSet;

use bytes::Bytes;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use qpq_mls::key_package;
use qpq_ports::{NewKeyPackage, Stock, Upload, UploadMode};
use qpq_proto::{Method as _, convert, methods, v1};
use sha2::{Digest as _, Sha256};

use super::check_owner;
use crate::{App, Caller, Cx, Error, Handled, Handler, Subject};

/// The number of KeyPackages, with two signatures and a hash each about a millisecond, after which
/// the call yields to others on its worker.
const STRIDE: usize = 8;

impl Handler for methods::UploadKeyPackage {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::UploadKeyPackageRequest,
    ) -> Handled<Self> {
        check_owner(&caller, &request.identity_key)?;
        let uploads = uploads(cx.app, &request)?;
        let more = u32::try_from(uploads.len() - 1).unwrap_or(u32::MAX);
        cx.charge(Self::INFO.limit, Subject::Account(caller.account), more).await?;
        let known = known(cx.app, caller.account, &uploads).await?;
        let packages = check(cx.app, &caller.identity, &uploads, &known, cx.now).await?;
        let mode = if request.replace { UploadMode::Replace } else { UploadMode::Add };
        let stored = cx.app.stores.key_packages.upload(caller.account, packages, mode, cx.now);
        let Stock { available, .. } = match stored.await? {
            Upload::Stored(stock) => stock,
            Upload::GivenOut(index) => {
                let field = uploads.get(index).map_or("package", |upload| upload.field);
                return Err(Error::invalid_package(field, HandedOut));
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

/// One package of a request.
struct Uploaded<'a> {
    bytes: &'a Bytes,
    field: &'static str,
    last_resort: bool,
}

/// The package was handed out before.
#[derive(Debug, thiserror::Error)]
#[error("the KeyPackage was handed out before")]
struct HandedOut;

/// Returns all packages of a request, at least one. `last_resort` applies to `package` alone.
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

/// Returns the fingerprints of the stored packages if the upload is large enough to profit: a
/// client that repeats an upload repeats many packages.
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

/// Checks every package; the error names the field of the first invalid one. The signatures of
/// known packages were verified when they were stored. The work is limited and done in small
/// steps, so that other calls are executed in between.
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
            .key_package_limiter
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
        // The fingerprint of the KeyPackage itself: bare or wrapped, it is handed out once.
        fingerprint: checked.reference,
        bytes: upload.bytes.to_vec(),
        last_resort: upload.last_resort || checked.last_resort,
        not_before: checked.not_before,
        not_after: checked.not_after,
    })
}
