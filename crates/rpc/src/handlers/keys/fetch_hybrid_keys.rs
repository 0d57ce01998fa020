//! FetchHybridKeys (304).

use qpq_proto::{convert, methods, v1};

use super::hybrid;
use crate::{Caller, Cx, Handled, Handler};

/// The maximum size of one key in the answer with its signature and framing, in bytes.
const KEY_BYTES: usize = hybrid::LEN + 64 + 16;

impl Handler for methods::FetchHybridKeys {
    fn answer_bytes(request: &v1::FetchHybridKeysRequest) -> usize {
        request.identity_keys.len() * KEY_BYTES
    }

    async fn handle(cx: Cx<'_>, _: Caller, request: v1::FetchHybridKeysRequest) -> Handled<Self> {
        let owners = convert::identity_keys(&request.identity_keys, "identity_keys")?;
        // At most 1 000 keys of 1 216 bytes, which fit one answer.
        let keys = cx.app.stores.hybrid_keys.get(&owners).await?;
        let (keys, signatures) = keys.into_iter().map(hybrid::fields).unzip();
        Ok(v1::FetchHybridKeysResponse { keys, signatures }.into())
    }
}
