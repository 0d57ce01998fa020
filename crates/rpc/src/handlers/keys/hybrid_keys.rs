//! Hybrid keys: uploading one's own (302), reading one (303) or many (304).

use bytes::Bytes;
use qpq_proto::{convert, methods, v1};

use super::{check_owner, hybrid};
use crate::{Answered, Caller, Cx, Error, Handler};

impl Handler for methods::UploadHybridKey {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::UploadHybridKeyRequest,
    ) -> Result<Answered<v1::UploadHybridKeyResponse>, Error> {
        check_owner(&caller, &request.identity_key)?;
        hybrid::check(&request.hybrid_public_key).map_err(|_| Error::InvalidHybridKey)?;
        cx.app.stores.hybrid_keys.put(caller.account, request.hybrid_public_key.to_vec()).await?;
        Ok(v1::UploadHybridKeyResponse {}.into())
    }
}

impl Handler for methods::FetchHybridKey {
    async fn handle(
        cx: Cx<'_>,
        _caller: Caller,
        request: v1::FetchHybridKeyRequest,
    ) -> Result<Answered<v1::FetchHybridKeyResponse>, Error> {
        let target = convert::identity_key(&request.identity_key, "identity_key")?;
        let keys = cx.app.stores.hybrid_keys.get(&[target]).await?;
        let hybrid_public_key = keys.into_iter().next().flatten().unwrap_or_default().into();
        Ok(v1::FetchHybridKeyResponse { hybrid_public_key }.into())
    }
}

/// One key at most, with its signature and their framing.
const KEY_BYTES: usize = 1_216 + 64 + 16;

impl Handler for methods::FetchHybridKeys {
    fn answer_bytes(request: &v1::FetchHybridKeysRequest) -> usize {
        request.identity_keys.len() * KEY_BYTES
    }

    async fn handle(
        cx: Cx<'_>,
        _caller: Caller,
        request: v1::FetchHybridKeysRequest,
    ) -> Result<Answered<v1::FetchHybridKeysResponse>, Error> {
        let targets = convert::identity_keys(&request.identity_keys, "identity_keys")?;
        // At most 1 000 keys of 1 216 bytes: they always fit one answer.
        let keys = cx.app.stores.hybrid_keys.get(&targets).await?;
        let keys = keys.into_iter().map(|key| key.map_or_else(Bytes::new, Bytes::from)).collect();
        Ok(v1::FetchHybridKeysResponse { keys }.into())
    }
}
