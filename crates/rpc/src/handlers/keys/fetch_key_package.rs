//! FetchKeyPackage (301).

use qpq_proto::{Method as _, convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler, Subject, account_events::AccountEvent};

impl Handler for methods::FetchKeyPackage {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchKeyPackageRequest,
    ) -> Handled<Self> {
        let target = convert::identity_key(&request.identity_key, "identity_key")?;
        cx.limit(Self::INFO.limit, Subject::Target(caller.account, &target)).await?;
        // An unknown account and one without packages have the same response.
        let Some(taken) = cx.app.stores.key_packages.take(&target, cx.now).await? else {
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
