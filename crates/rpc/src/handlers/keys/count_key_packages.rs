//! CountKeyPackages (305).

use qpq_ports::Stock;
use qpq_proto::{methods, v1};

use super::OwnDevices;
use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::CountKeyPackages {
    async fn handle(cx: Cx<'_>, caller: Caller, _: v1::CountKeyPackagesRequest) -> Handled<Self> {
        let owner = OwnDevices::of(cx, &caller).await?.owner(&caller);
        let Stock { available, has_last_resort } =
            cx.app.stores.key_packages.stock(owner, cx.now).await?;
        Ok(v1::CountKeyPackagesResponse { available, has_last_resort }.into())
    }
}
