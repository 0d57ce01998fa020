//! FetchKeyPackage (301).

use bytes::Bytes;
use qpq_domain::{IdentityKey, MAX_DEVICES};
use qpq_ports::DevicePackage;
use qpq_proto::{Method as _, convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler, Subject, account_events::AccountEvent};

/// The maximum size of the package of one device in the answer, in bytes.
const PACKAGE_BYTES: usize = (64 << 10) + 64;

impl Handler for methods::FetchKeyPackage {
    fn answer_bytes(request: &v1::FetchKeyPackageRequest) -> usize {
        if request.all_devices { MAX_DEVICES * PACKAGE_BYTES } else { 0 }
    }

    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchKeyPackageRequest,
    ) -> Handled<Self> {
        let target = convert::identity_key(&request.identity_key, "identity_key")?;
        cx.limit(Self::INFO.limit, Subject::Target(caller.account, &target)).await?;
        let key_packages = &cx.app.stores.key_packages;
        if request.all_devices {
            let taken = key_packages.take_of_devices(&target, cx.now).await?;
            // An account without devices has packages of its own.
            if !taken.is_empty() {
                return Ok(of_devices(cx, &target, taken).into());
            }
        }
        // An unknown account and one without packages have the same response.
        let Some(taken) = key_packages.take(&target, cx.now).await? else {
            return Ok(v1::FetchKeyPackageResponse::default().into());
        };
        cx.app.account_events.publish(&target, AccountEvent::KeyPackageTaken);
        Ok(v1::FetchKeyPackageResponse {
            package: taken.bytes.into(),
            last_resort: taken.last_resort,
            packages: Vec::new(),
        }
        .into())
    }
}

/// Returns one entry for each device.
fn of_devices(
    cx: Cx<'_>,
    target: &IdentityKey,
    taken: Vec<DevicePackage>,
) -> v1::FetchKeyPackageResponse {
    if taken.iter().any(|entry| entry.package.is_some()) {
        cx.app.account_events.publish(target, AccountEvent::KeyPackageTaken);
    }
    let entry = |DevicePackage { device, package }: DevicePackage| {
        let device_id = Bytes::copy_from_slice(device.as_bytes());
        match package {
            Some(taken) => v1::DevicePackage {
                device_id,
                package: taken.bytes.into(),
                last_resort: taken.last_resort,
            },
            None => v1::DevicePackage { device_id, ..v1::DevicePackage::default() },
        }
    };
    let packages = taken.into_iter().map(entry).collect();
    v1::FetchKeyPackageResponse { packages, ..v1::FetchKeyPackageResponse::default() }
}
