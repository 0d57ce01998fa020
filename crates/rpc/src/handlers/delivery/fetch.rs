//! Fetch (201): reads messages, which are removed once the client has them.

use qpq_proto::{methods, v1};

use super::{
    page,
    read::{Target, lease, owe},
};
use crate::{Caller, Cx, Handled, Handler, Response};

impl Handler for methods::Fetch {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::FetchRequest) -> Handled<Self> {
        let query = Target {
            recipient_key: &request.recipient_key,
            device_id: &request.device_id,
            channel_id: &request.channel_id,
            all_channels: request.all_channels,
        }
        .query(&caller)?;
        let limit = page::limit(request.limit);
        let Some((lease, memory)) = lease(cx, &caller, query, limit).await? else {
            let store_id = page::store_id(&cx.app.stores.maintenance.store_id());
            return Ok(v1::FetchResponse { store_id, ..Default::default() }.into());
        };
        owe(cx, &caller, page::cost(lease.page()));
        let response = v1::FetchResponse {
            payloads: page::envelopes(lease.page()),
            more: lease.page().more,
            store_id: page::store_id(&lease.page().store_id),
        };
        Ok(Response::with_lease(response, lease, memory))
    }
}
