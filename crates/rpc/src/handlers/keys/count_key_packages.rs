//! CountKeyPackages (305).

use qpq_ports::Stock;
use qpq_proto::{methods, v1};

use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::CountKeyPackages {
    async fn handle(cx: Cx<'_>, caller: Caller, _: v1::CountKeyPackagesRequest) -> Handled<Self> {
        let Stock { available, has_last_resort } =
            cx.app.stores.key_packages.stock(caller.account, cx.now).await?;
        Ok(v1::CountKeyPackagesResponse { available, has_last_resort }.into())
    }
}
