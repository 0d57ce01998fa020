//! UploadKeyPackage (300): checks and stores KeyPackages.

use std::collections::HashSet;

use bytes::Bytes;
use qpq_domain::{AccountId, UnixMillis};
use qpq_mls::key_package;
use qpq_ports::{NewKeyPackage, Stock, Upload, UploadMode};
use qpq_proto::{Method as _, convert, methods, v1};
use sha2::{Digest as _, Sha256};

use super::{OwnDevices, check_owner};
use crate::{App, Caller, Cx, Error, Handled, Handler, Subject};

/// The number of KeyPackages after which the call yields to others on its worker. The checks of
/// that number, two signatures and a hash each, take about a millisecond.
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
        let devices = OwnDevices::of(cx, &caller).await?;
        let checks = Checks {
            app: cx.app,
            signers: devices.signers(&caller.identity),
            devices: &devices,
            known,
            now: cx.now,
        };
        let packages = checks.all(&uploads).await?;
        let mode = if request.replace { UploadMode::Replace } else { UploadMode::Add };
        let owner = devices.owner(&caller);
        let stored = cx.app.stores.key_packages.upload(owner, packages, mode, cx.now);
        let Stock { available, .. } = match stored.await? {
            Upload::Stored(stock) => stock,
            Upload::Taken(index) => {
                let field = uploads.get(index).map_or("package", |upload| upload.field);
                return Err(Error::invalid_package(field, KeyPackageTaken));
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

/// The refusal of a package that was handed out before.
#[derive(Debug, thiserror::Error)]
#[error("the KeyPackage was handed out before")]
struct KeyPackageTaken;

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

/// Returns the fingerprints of the stored packages, so that a repeated upload need not verify their
/// signatures again. Empty for a small upload, for which the query would save little.
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

/// The checks of the packages of one request.
struct Checks<'a> {
    app: &'a App,
    devices: &'a OwnDevices,
    /// The keys of the account and of its devices.
    signers: Vec<[u8; 32]>,
    /// The stored packages, whose signatures were verified when they were stored.
    known: HashSet<[u8; 32]>,
    now: UnixMillis,
}

impl Checks<'_> {
    /// Checks every package. The error names the field of the first invalid one. The work passes a
    /// limiter in small steps, so that other calls are executed in between.
    async fn all(&self, uploads: &[Uploaded<'_>]) -> Result<Vec<NewKeyPackage>, Error> {
        let mut packages = Vec::with_capacity(uploads.len());
        for some in uploads.chunks(STRIDE) {
            let checked = self
                .app
                .key_package_limiter
                .run(|| some.iter().map(|upload| self.one(upload)).collect());
            let checked: Result<Vec<_>, Error> = checked.await?;
            packages.extend(checked?);
            tokio::task::yield_now().await;
        }
        Ok(packages)
    }

    fn one(&self, upload: &Uploaded<'_>) -> Result<NewKeyPackage, Error> {
        let rejected = |rejected| Error::invalid_package(upload.field, rejected);
        let policy = &self.app.key_package_policy;
        let checked = key_package::inspect(upload.bytes, policy, &self.signers, self.now)
            .map_err(rejected)?;
        if !self.known.contains(&checked.reference) {
            key_package::verify_signatures(upload.bytes).map_err(rejected)?;
        }
        Ok(NewKeyPackage {
            // The fingerprint of the KeyPackage without the MLSMessage around it, so that a package
            // in both forms is handed out only once.
            fingerprint: checked.reference,
            bytes: upload.bytes.to_vec(),
            device: self.devices.signed_by(checked.signature_key.as_ref()),
            last_resort: upload.last_resort || checked.last_resort,
            not_before: checked.not_before,
            not_after: checked.not_after,
        })
    }
}
