//! Ack (204): removes messages that were read.

use qpq_domain::Seq;
use qpq_ports::Ack;
use qpq_proto::{convert, methods, v1};

use super::{
    page,
    read::{Target, owe, refused},
};
use crate::{Caller, Cx, Handled, Handler};

/// The maximum number of seqs of one Ack: the default maximum of messages in an inbox.
const MAX_ACK_SEQS: usize = 10_000;

impl Handler for methods::Ack {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::AckRequest) -> Handled<Self> {
        let query = Target {
            recipient_key: &request.recipient_key,
            device_id: &request.device_id,
            channel_id: &request.channel_id,
            all_channels: request.all_channels,
        }
        .query(&caller)?;
        convert::at_most(request.seqs.len(), MAX_ACK_SEQS, "seqs")?;
        let up_to = Some(Seq(request.seq_up_to)).filter(|seq| *seq > Seq::ZERO);
        let seqs = request.seqs.iter().copied().map(Seq).collect();
        // If the store was restored since the peek (another history), these seqs may belong to
        // other messages, so this ack removes nothing. Later acks do, because the client may have
        // read the present history on another connection.
        let store_id = cx.conn.peeked_history();
        let ack = Ack { up_to, seqs, store_id };
        // An empty ack, from a client that acknowledges an empty page, needs no store.
        let removed = if ack.is_empty() {
            0
        } else {
            let named = ack.seqs.len();
            let removed = match cx.app.stores.inboxes.ack(query, ack, cx.now).await {
                Ok(removed) => removed,
                Err(error) => return Err(refused(cx, &caller, &query, error).await),
            };
            owe(cx, &caller, page::calls(named.max(removed as usize)));
            removed
        };
        if let Some(peeked) = store_id
            && peeked != cx.app.stores.maintenance.store_id()
        {
            cx.conn.clear_peeked_history(peeked);
        }
        Ok(v1::AckResponse { removed }.into())
    }
}
