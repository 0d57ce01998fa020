//! Peek (203): reads messages and leaves them in the inbox.

use qpq_domain::Seq;
use qpq_proto::{methods, v1};

use super::{
    page,
    read::{Target, owe, refused},
};
use crate::{Caller, Cx, Handled, Handler, Response};

impl Handler for methods::Peek {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::PeekRequest) -> Handled<Self> {
        let query = Target {
            recipient_key: &request.recipient_key,
            device_id: &request.device_id,
            channel_id: &request.channel_id,
            all_channels: request.all_channels,
        }
        .query(&caller)?;
        let wanted = page::limit(request.limit);
        let after = Seq(request.after_seq);
        let inboxes = &cx.app.stores.inboxes;
        let mut space = page::space(cx, &caller, wanted).await?;
        let page = loop {
            let page = match inboxes.peek(query, after, space.limit, cx.now).await {
                Ok(page) => page,
                Err(error) => return Err(refused(cx, &caller, &query, error).await),
            };
            if space.fits(&page) {
                break page;
            }
            drop((page, space));
            space = page::full_space(cx, &caller, wanted).await?;
        };
        if !page.envelopes.is_empty() {
            cx.conn.set_peeked_history(page.store_id);
        }
        owe(cx, &caller, page::cost(&page));
        let message = v1::PeekResponse {
            payloads: page::envelopes(&page),
            more: page.more,
            store_id: page::store_id(&page.store_id),
        };
        Ok(Response { message, lease: None, memory: Some(space.memory) })
    }
}
