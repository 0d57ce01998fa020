//! ListBlocked (426).

use bytes::Bytes;
use qpq_domain::MAX_BLOCKS;
use qpq_proto::{methods, v1};

use crate::{Caller, Cx, Handled, Handler};

/// The size of a key in the answer, in bytes.
const KEY_BYTES: usize = 2 + 32;

impl Handler for methods::ListBlocked {
    fn answer_bytes(_: &v1::ListBlockedRequest) -> usize {
        MAX_BLOCKS * KEY_BYTES
    }

    async fn handle(cx: Cx<'_>, caller: Caller, _: v1::ListBlockedRequest) -> Handled<Self> {
        let blocked = cx.app.stores.blocks.list(caller.account).await?;
        let keys = blocked.iter().map(|key| Bytes::copy_from_slice(key.as_bytes()));
        Ok(v1::ListBlockedResponse { identity_keys: keys.collect() }.into())
    }
}
