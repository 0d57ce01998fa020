//! UploadHybridKey (302).

use qpq_ports::HybridKey;
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
        let signature = signature(&caller, &request)?;
        let key = HybridKey { key: request.hybrid_public_key.to_vec(), signature };
        cx.app.stores.hybrid_keys.put(caller.account, key).await?;
        Ok(v1::UploadHybridKeyResponse {}.into())
    }
}

/// Verifies and returns the identity key's signature over the key. `None` if the request has none.
fn signature(
    caller: &Caller,
    request: &v1::UploadHybridKeyRequest,
) -> Result<Option<[u8; 64]>, Error> {
    if request.signature.is_empty() {
        return Ok(None);
    }
    let signature: [u8; 64] =
        request.signature[..].try_into().map_err(|_| Error::InvalidHybridSignature)?;
    let message = [hybrid::SIGNATURE_CONTEXT, &request.hybrid_public_key[..]].concat();
    caller.identity.verify(&message, &signature).map_err(|_| Error::InvalidHybridSignature)?;
    Ok(Some(signature))
}
