//! Recovery bundles (750 to 752).
//!
//! A client encrypts its bundle. The server seals the bundle again under a key that is not in the
//! database ([`crate::at_rest`]), bound to the account and the version.

use bytes::Bytes;
use qpq_ports::{BundleFetch, BundlePut, BundleState, NewBundle, StoreError};
use qpq_proto::{
    methods::{DeleteRecoveryBundle, FetchRecoveryBundle, StoreRecoveryBundle},
    v1::{
        DeleteRecoveryBundleRequest, DeleteRecoveryBundleResponse, FetchRecoveryBundleRequest,
        FetchRecoveryBundleResponse, StoreRecoveryBundleRequest, StoreRecoveryBundleResponse,
    },
};

use crate::{
    Caller, Cx, Error, FreshCaller, Handled, Handler,
    at_rest::{Place, Purpose},
};

/// The maximum size of a bundle.
const MAX_BUNDLE: usize = 64 << 10;

/// The number of fetches of an account within a day.
const FETCHES_PER_DAY: u32 = 10;

/// Maximum attempts at a store without an expected version while other calls store bundles.
const MAX_ATTEMPTS: u32 = 8;

impl Handler for StoreRecoveryBundle {
    /// The bundle is sealed for its version, so the version is read first. The store accepts the
    /// bundle only if that version is still the present one.
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: StoreRecoveryBundleRequest,
    ) -> Handled<Self> {
        match request.bundle.len() {
            0 => return Err(Error::EmptyBundle),
            1..=MAX_BUNDLE => {}
            _ => return Err(Error::BundleTooLarge),
        }
        let bundles = &cx.app.stores.recovery_bundles;
        for _ in 0..MAX_ATTEMPTS {
            let state = bundles.find(caller.account).await?;
            let replaces = state.version;
            if request.expected_version != 0 && request.expected_version != replaces {
                return match is_repeat(cx, &caller, &state, &request)? {
                    true => Ok(stored(replaces)),
                    false => Err(Error::StaleBundleVersion),
                };
            }
            let sealed = cx.app.at_rest.seal(place(&caller, replaces + 1), &request.bundle);
            let bundle = NewBundle {
                account: caller.account,
                replaces,
                sealed: sealed.bytes,
                key: sealed.key,
                now: cx.now,
            };
            if bundles.put(bundle).await? == BundlePut::Stored {
                return Ok(stored(replaces + 1));
            }
        }
        Err(Error::Conflict(StoreError::conflict("other bundles were stored in every attempt")))
    }
}

impl Handler for FetchRecoveryBundle {
    async fn handle(
        cx: Cx<'_>,
        caller: FreshCaller,
        _: FetchRecoveryBundleRequest,
    ) -> Handled<Self> {
        let caller = caller.caller();
        let bundles = &cx.app.stores.recovery_bundles;
        match bundles.fetch(caller.account, cx.now, FETCHES_PER_DAY).await? {
            BundleFetch::Found(found) => {
                let opened = cx.app.at_rest.open(place(caller, found.version), &found.sealed);
                let bundle = Bytes::from(opened.map_err(Error::internal)?.to_vec());
                let (version, stored_at) = (found.version, found.stored_at.0);
                Ok(FetchRecoveryBundleResponse { bundle, version, stored_at }.into())
            }
            BundleFetch::Absent(version) => {
                Ok(FetchRecoveryBundleResponse { version, ..Default::default() }.into())
            }
            BundleFetch::Limited(wait) => Err(Error::BundleFetchesUsedUp(wait)),
        }
    }
}

impl Handler for DeleteRecoveryBundle {
    async fn handle(
        cx: Cx<'_>,
        caller: FreshCaller,
        _: DeleteRecoveryBundleRequest,
    ) -> Handled<Self> {
        cx.app.stores.recovery_bundles.remove(caller.caller().account).await?;
        Ok(DeleteRecoveryBundleResponse { success: true }.into())
    }
}

fn place(caller: &Caller, version: u64) -> Place<'_> {
    Place { purpose: Purpose::RecoveryBundle, identity: &caller.identity, version }
}

fn stored(version: u64) -> crate::Response<StoreRecoveryBundleResponse> {
    StoreRecoveryBundleResponse { success: true, version }.into()
}

/// Returns whether the request is a repeat of the one that has stored the present bundle.
fn is_repeat(
    cx: Cx<'_>,
    caller: &Caller,
    state: &BundleState,
    request: &StoreRecoveryBundleRequest,
) -> Result<bool, Error> {
    match &state.bundle {
        Some(bundle) if request.expected_version.checked_add(1) == Some(state.version) => {
            let opened = cx.app.at_rest.open(place(caller, state.version), &bundle.sealed);
            Ok(opened.map_err(Error::internal)?[..] == request.bundle[..])
        }
        _ => Ok(false),
    }
}
