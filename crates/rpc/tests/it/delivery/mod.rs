//! Sending messages and reading an inbox.

mod batch;
mod enqueue;
mod fetch_wait;
mod reads;

use bytes::Bytes;
use qpq_proto::{methods, v1};

use crate::{harness::User, user::OkAnswer};

const CHANNEL: Bytes = Bytes::from_static(&[0xc1; 16]);
const OTHER_CHANNEL: Bytes = Bytes::from_static(&[0xc2; 16]);

/// Returns a message id.
fn message_id(n: u8) -> Bytes {
    vec![n; 16].into()
}

/// Leases all messages of the default channel.
async fn fetch(user: &User) -> OkAnswer<v1::FetchResponse> {
    user.ask::<methods::Fetch>(v1::FetchRequest::default()).await.expect("the user's own inbox")
}

/// Peeks the messages of all channels.
async fn peek_all(user: &User) -> v1::PeekResponse {
    user.ok::<methods::Peek>(v1::PeekRequest { all_channels: true, ..Default::default() }).await
}

fn seqs(envelopes: &[v1::Envelope]) -> Vec<u64> {
    envelopes.iter().map(|envelope| envelope.seq).collect()
}

fn bodies(envelopes: &[v1::Envelope]) -> Vec<&[u8]> {
    envelopes.iter().map(|envelope| envelope.data.as_ref()).collect()
}
