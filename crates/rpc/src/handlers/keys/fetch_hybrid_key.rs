//! FetchHybridKey (303).

use qpq_proto::{convert, methods, v1};

use super::hybrid;
use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::FetchHybridKey {
    async fn handle(cx: Cx<'_>, _: Caller, request: v1::FetchHybridKeyRequest) -> Handled<Self> {
        let owner = convert::identity_key(&request.identity_key, "identity_key")?;
        let keys = cx.app.stores.hybrid_keys.get(&[owner]).await?;
        let (hybrid_public_key, signature) = hybrid::fields(keys.into_iter().next().flatten());
        Ok(v1::FetchHybridKeyResponse { hybrid_public_key, signature }.into())
    }
}
