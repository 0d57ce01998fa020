//! UploadHybridKey (302).

use qpq_proto::{methods, v1};

use super::{check_owner, hybrid};
use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for methods::UploadHybridKey {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::UploadHybridKeyRequest,
    ) -> Handled<Self> {
        check_owner(&caller, &request.identity_key)?;
        hybrid::check(&request.hybrid_public_key).map_err(|_| Error::InvalidHybridKey)?;
        cx.app.stores.hybrid_keys.put(caller.account, request.hybrid_public_key.to_vec()).await?;
        Ok(v1::UploadHybridKeyResponse {}.into())
    }
}
