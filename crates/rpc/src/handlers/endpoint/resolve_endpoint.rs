//! ResolveEndpoint (801).

use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for methods::ResolveEndpoint {
    async fn handle(cx: Cx<'_>, _: Caller, request: v1::ResolveEndpointRequest) -> Handled<Self> {
        let owner = convert::identity_key(&request.identity_key, "identity_key")?;
        let stores = &cx.app.stores;
        if stores.accounts.by_identity(&owner).await?.is_none() {
            return Err(Error::UserNotFound);
        }
        let found = stores.endpoints.resolve(&owner, cx.now).await?;
        Ok(found
            .map_or_else(v1::ResolveEndpointResponse::default, |endpoint| {
                let expires_at = endpoint.expires_at.0;
                v1::ResolveEndpointResponse { node_addr: endpoint.node_addr, expires_at }
            })
            .into())
    }
}
