//! BatchEnqueue (205).

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadError, ReadQuery, StoreError,
    StoreResult, Stores,
};
use qpq_proto::{
    Status, methods,
    v1::{self, BatchEnqueueRequest, BatchEnqueueResponse, BatchResult, EnqueueRequest},
};

use super::{CHANNEL, OTHER_CHANNEL, bodies, fetch, message_id, peek_all, seqs};
use crate::{
    harness::{Server, User, new_identity},
    user::message,
};

fn fan_out(recipients: &[&User], payload: &'static [u8]) -> BatchEnqueueRequest {
    BatchEnqueueRequest {
        recipient_keys: recipients.iter().map(|user| user.key()).collect(),
        payload: Bytes::from_static(payload),
        ..Default::default()
    }
}

fn list(messages: Vec<EnqueueRequest>) -> BatchEnqueueRequest {
    BatchEnqueueRequest { messages, ..Default::default() }
}

async fn send(user: &User, request: BatchEnqueueRequest) -> BatchEnqueueResponse {
    let response = user.ok::<methods::BatchEnqueue>(request).await;
    assert_eq!(response.seqs, response.results.iter().map(|result| result.seq).collect::<Vec<_>>());
    assert_eq!(response.epoch, 0);
    for result in &response.results {
        let accepted = result.status == 0;
        assert_eq!(accepted, result.seq > 0, "{result:?}");
        assert_eq!(accepted, result.code.is_empty(), "{result:?}");
        assert_eq!(accepted, !result.delivery_proof.is_empty(), "{result:?}");
    }
    response
}

fn outcomes(response: &BatchEnqueueResponse) -> Vec<(u64, u32, &str)> {
    response.results.iter().map(|r: &BatchResult| (r.seq, r.status, r.code.as_str())).collect()
}

#[tokio::test]
async fn a_batch_is_either_a_fan_out_or_a_list() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let (fan, one) = (fan_out(&[&alice], b"hello"), message(&alice, b"hello"));
    for request in [
        BatchEnqueueRequest::default(),
        BatchEnqueueRequest { recipient_keys: vec![], ..fan.clone() },
        BatchEnqueueRequest { messages: vec![one.clone()], ..fan.clone() },
        BatchEnqueueRequest { payload: "x".into(), ..list(vec![one.clone()]) },
        BatchEnqueueRequest { channel_id: CHANNEL, ..list(vec![one.clone()]) },
        BatchEnqueueRequest { ttl_secs: 1, ..list(vec![one.clone()]) },
        BatchEnqueueRequest { message_id: message_id(1), ..list(vec![one.clone()]) },
        BatchEnqueueRequest {
            recipient_keys: (0..1_001_u32).map(|n| [n.to_be_bytes(); 8].concat().into()).collect(),
            ..fan.clone()
        },
        list(vec![one; 1_001]),
    ] {
        alice
            .refused::<methods::BatchEnqueue>(request)
            .await
            .assert(Status::BadRequest, "delivery.invalid_batch");
    }
    assert!(peek_all(&alice).await.payloads.is_empty());
}

#[tokio::test]
async fn each_recipient_of_a_fan_out_has_its_own_result() {
    let server = Server::with(|config| config.delivery.max_messages = 1).await;
    let (alice, bob, carol) =
        (server.user("alice").await, server.user("bob").await, server.user("carol").await);
    alice.send(&carol, b"fills it").await;
    let mut request = fan_out(&[&bob, &carol, &alice], b"hello");
    request.channel_id = CHANNEL;
    request.recipient_keys.insert(1, Bytes::copy_from_slice(new_identity().as_bytes()));
    request.recipient_keys.insert(2, Bytes::from_static(b"short"));
    let response = send(&alice, request).await;
    assert_eq!(
        outcomes(&response),
        [
            (1, 0, ""),
            (0, 4, "delivery.no_such_recipient"),
            (0, 1, "rpc.invalid_field"),
            (0, 5, "delivery.queue_full"),
            (1, 0, ""),
        ]
    );
    let all = peek_all(&bob).await;
    assert_eq!(bodies(&all.payloads), [b"hello"]);
    assert_eq!(all.payloads[0].channel_id, CHANNEL);
}

#[tokio::test]
async fn an_invalid_shared_field_fails_the_whole_fan_out() {
    let server = Server::with(|config| config.delivery.max_payload = 5).await;
    let alice = server.user("alice").await;
    let good = fan_out(&[&alice], b"hello");
    let request = BatchEnqueueRequest { channel_id: "short".into(), ..good.clone() };
    alice.refused::<methods::BatchEnqueue>(request).await.assert_field("channel_id");
    let request = BatchEnqueueRequest { message_id: "short".into(), ..good.clone() };
    alice.refused::<methods::BatchEnqueue>(request).await.assert_field("message_id");
    let request = BatchEnqueueRequest { payload: "hello!".into(), ..good };
    let refused = alice.refused::<methods::BatchEnqueue>(request).await;
    refused.assert(Status::BadRequest, "delivery.payload_too_large");
}

#[tokio::test]
async fn each_message_of_a_list_has_its_own_result() {
    let server = Server::with(|config| config.delivery.max_payload = 5).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let response = send(
        &alice,
        list(vec![
            EnqueueRequest { channel_id: CHANNEL, ..message(&bob, b"one") },
            EnqueueRequest { recipient_key: Bytes::new(), ..message(&bob, b"none") },
            EnqueueRequest { channel_id: "short".into(), ..message(&bob, b"none") },
            EnqueueRequest { message_id: "short".into(), ..message(&bob, b"none") },
            message(&bob, b"large!"),
            EnqueueRequest { channel_id: OTHER_CHANNEL, ..message(&bob, b"two") },
            message(&alice, b"mine"),
            message(&bob, b""),
        ]),
    )
    .await;
    assert_eq!(
        outcomes(&response),
        [
            (1, 0, ""),
            (0, 1, "rpc.invalid_field"),
            (0, 1, "rpc.invalid_field"),
            (0, 1, "rpc.invalid_field"),
            (0, 1, "delivery.payload_too_large"),
            (2, 0, ""),
            (1, 0, ""),
            (3, 0, ""),
        ]
    );
    assert_eq!(bodies(&peek_all(&bob).await.payloads), [&b"one"[..], b"two", b""]);
    assert_eq!(bodies(&fetch(&alice).await.response.payloads), [b"mine"]);
}

#[tokio::test]
async fn a_batch_of_only_refused_messages_is_answered_ok() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let response = send(&alice, list(vec![EnqueueRequest::default(); 2])).await;
    assert_eq!(outcomes(&response), [(0, 1, "rpc.invalid_field"); 2]);
}

#[tokio::test]
async fn the_token_of_a_listed_message_is_ignored() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let with_token = EnqueueRequest {
        session_token: bob.token.clone(),
        message_id: message_id(1),
        ..message(&alice, b"hello")
    };
    send(&alice, list(vec![with_token])).await;
    // Alice is the sender, so the message id is one of hers, not of bob's.
    let hers = EnqueueRequest { message_id: message_id(1), ..message(&alice, b"hello") };
    assert!(alice.ok::<methods::Enqueue>(hers.clone()).await.duplicate);
    assert!(!bob.ok::<methods::Enqueue>(hers).await.duplicate);
}

#[tokio::test]
async fn a_fan_out_that_names_a_recipient_twice_is_refused() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    for message_id in [Bytes::new(), message_id(1)] {
        let request =
            BatchEnqueueRequest { message_id, ..fan_out(&[&bob, &alice, &bob], b"hello") };
        let refused = alice.refused::<methods::BatchEnqueue>(request).await;
        refused.assert(Status::BadRequest, "delivery.invalid_batch");
    }
    assert!(peek_all(&bob).await.payloads.is_empty());
    // The messages of a list may have the same recipient.
    let twice = send(&alice, list(vec![message(&bob, b"one"), message(&bob, b"two")])).await;
    assert_eq!(twice.seqs, [1, 2]);
}

#[tokio::test]
async fn a_repeated_fan_out_returns_the_first_receipts() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let request =
        BatchEnqueueRequest { message_id: message_id(1), ..fan_out(&[&bob, &alice], b"once") };
    let once = send(&alice, request.clone()).await;
    assert!(once.results.iter().all(|result| !result.duplicate));
    let again = send(&alice, request).await;
    assert!(again.results.iter().all(|result| result.duplicate));
    for (first, second) in once.results.iter().zip(&again.results) {
        assert_eq!((first.seq, &first.delivery_proof), (second.seq, &second.delivery_proof));
    }
    assert_eq!(bodies(&peek_all(&bob).await.payloads), [b"once"]);
}

#[tokio::test]
async fn the_bytes_of_a_batch_for_all_recipients_are_bounded() {
    let server = Server::with(|config| config.delivery.max_batch_bytes = 100).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let [half, more] = [&[b'x'; 50][..], &[b'x'; 51]];
    send(&alice, fan_out(&[&alice, &bob], half)).await;
    let refused = alice.refused::<methods::BatchEnqueue>(fan_out(&[&alice, &bob], more)).await;
    refused.assert(Status::BadRequest, "delivery.batch_too_large");
    send(&alice, fan_out(&[&alice], more)).await;

    send(&alice, list(vec![message(&alice, half), message(&bob, half)])).await;
    let request = list(vec![message(&alice, half), message(&bob, more)]);
    let refused = alice.refused::<methods::BatchEnqueue>(request).await;
    refused.assert(Status::BadRequest, "delivery.batch_too_large");
    assert_eq!(peek_all(&bob).await.payloads.len(), 2);
}

#[tokio::test]
async fn a_batch_above_64_mib_is_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let mut request = BatchEnqueueRequest {
        recipient_keys: (0..65).map(|n| vec![n; 32].into()).collect(),
        payload: vec![0; 1 << 20].into(),
        ..Default::default()
    };
    let refused = alice.refused::<methods::BatchEnqueue>(request.clone()).await;
    refused.assert(Status::BadRequest, "delivery.batch_too_large");
    request.recipient_keys.pop();
    assert_eq!(send(&alice, request).await.results.len(), 64);
}

/// The store's calls for a batch.
#[derive(Default)]
struct Calls {
    sizes: Mutex<Vec<(usize, usize)>>,
    payloads: Mutex<HashSet<usize>>,
    /// The number of calls before the first that fails.
    accepted: AtomicUsize,
}

struct Recorded {
    inner: Arc<dyn Inboxes>,
    calls: Arc<Calls>,
}

#[derive(Debug, thiserror::Error)]
#[error("the disk is full")]
struct Full;

#[async_trait]
impl Inboxes for Recorded {
    async fn enqueue(&self, batch: Batch) -> StoreResult<Vec<Enqueued>> {
        let messages = &batch.messages;
        let bytes = messages.iter().map(|message| message.payload.len()).sum();
        self.calls.sizes.lock().push((messages.len(), bytes));
        let addresses = messages.iter().map(|message| message.payload.as_ptr() as usize);
        self.calls.payloads.lock().extend(addresses);
        let countdown = |left: usize| left.checked_sub(1);
        match self.calls.accepted.fetch_update(Ordering::SeqCst, Ordering::SeqCst, countdown) {
            Ok(_) => self.inner.enqueue(batch).await,
            Err(_) => Err(StoreError::unavailable(Full)),
        }
    }

    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Box<dyn Lease>, ReadError> {
        self.inner.lease(read, limit, now).await
    }

    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Page, ReadError> {
        self.inner.peek(read, after, limit, now).await
    }

    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> Result<u32, ReadError> {
        self.inner.ack(read, ack, now).await
    }
}

async fn recorded() -> (Server, Arc<Calls>) {
    let calls = Arc::<Calls>::default();
    calls.accepted.store(usize::MAX, Ordering::SeqCst);
    let record = |mut stores: Stores| {
        let inner = Arc::clone(&stores.inboxes);
        stores.inboxes = Arc::new(Recorded { inner, calls: Arc::clone(&calls) });
        stores
    };
    (Server::with_stores(|_| {}, record).await, calls)
}

#[tokio::test]
async fn a_batch_is_stored_in_calls_of_bounded_size_that_share_one_payload() {
    let (server, calls) = recorded().await;
    let alice = server.user("alice").await;
    let to = |count: u16, payload: Vec<u8>| {
        let key = |n: u16| Bytes::from([n.to_be_bytes(); 16].concat());
        BatchEnqueueRequest {
            recipient_keys: (0..count).map(key).collect(),
            payload: payload.into(),
            ..Default::default()
        }
    };
    let cases = [
        (to(1_000, vec![]), vec![(256, 0), (256, 0), (256, 0), (232, 0)]),
        (to(64, vec![0; 1 << 20]), vec![(1, 1 << 20); 64]),
        (to(5, vec![0; 400_000]), vec![(2, 800_000), (2, 800_000), (1, 400_000)]),
    ];
    for (request, expected) in cases {
        let response = send(&alice, request).await;
        assert_eq!(std::mem::take(&mut *calls.sizes.lock()), expected);
        assert_eq!(std::mem::take(&mut *calls.payloads.lock()).len(), 1, "one copy in memory");
        assert!(response.results.iter().all(|r| r.code == "delivery.no_such_recipient"));
    }
}

#[tokio::test]
async fn a_partly_stored_batch_reports_it_and_its_repetition_duplicates_nothing() {
    let (server, calls) = recorded().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let numbered = |n: u32| EnqueueRequest {
        payload: n.to_be_bytes().to_vec().into(),
        message_id: [n.to_be_bytes(); 4].concat().into(),
        ..message(&bob, b"")
    };
    let request = list((0..600).map(numbered).collect());
    calls.accepted.store(2, Ordering::SeqCst);
    let half = send(&alice, request.clone()).await;
    let accepted = half.results.iter().take_while(|result| result.status == 0).count();
    assert_eq!(accepted, 512);
    assert!(half.results[512..].iter().all(|r| (r.status, &*r.code) == (9, "rpc.unavailable")));
    assert_eq!(calls.sizes.lock().len(), 3, "nothing is tried after the failure, or again");

    // If nothing is accepted, the call fails.
    let refused = alice.refused::<methods::BatchEnqueue>(request.clone()).await;
    refused.assert(Status::Unavailable, "rpc.unavailable");

    calls.accepted.store(usize::MAX, Ordering::SeqCst);
    let whole = send(&alice, request).await;
    let duplicates = whole.results.iter().take_while(|result| result.duplicate).count();
    assert_eq!(duplicates, 512);
    assert_eq!(whole.seqs, (1..=600).collect::<Vec<_>>());
    assert_eq!(seqs(&peek_all(&bob).await.payloads), whole.seqs);
}

#[tokio::test]
async fn one_sender_cannot_fill_an_inbox_with_messages() {
    let server = Server::start().await;
    let (bob, stranger, friend) =
        (server.user("bob").await, server.user("stranger").await, server.user("friend").await);
    let mut results = Vec::new();
    for _ in 0..10 {
        results.extend(send(&stranger, list(vec![message(&bob, b""); 1_000])).await.results);
    }
    let accepted = results.iter().filter(|result| result.status == 0).count();
    assert_eq!(accepted, 5_001, "half of the inbox, and the message that went beyond it");
    assert!(
        results[accepted..].iter().all(|r| (r.status, &*r.code) == (5, "delivery.sender_share"))
    );
    let refused = stranger.refused::<methods::Enqueue>(message(&bob, b"")).await;
    refused.assert(Status::RateLimited, "delivery.sender_share");
    assert!(refused.retry_after.is_some());
    assert_eq!(friend.send(&bob, b"hello").await.seq, 5_002);
}

#[tokio::test]
async fn one_sender_cannot_fill_an_inbox_with_bytes() {
    let server = Server::start().await;
    let (bob, stranger, friend) =
        (server.user("bob").await, server.user("stranger").await, server.user("friend").await);
    let payload = Bytes::from(vec![0; 1 << 20]);
    let large = EnqueueRequest { payload: payload.clone(), ..message(&bob, b"") };
    for _ in 0..33 {
        stranger.ok::<methods::Enqueue>(large.clone()).await;
    }
    for _ in 0..31 {
        let refused = stranger.refused::<methods::Enqueue>(large.clone()).await;
        refused.assert(Status::RateLimited, "delivery.sender_share");
    }
    friend.send(&bob, b"hello").await;
    friend.ok::<methods::Enqueue>(large).await;
}

#[tokio::test]
async fn an_enqueue_and_a_batch_share_message_ids() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let one = EnqueueRequest { message_id: message_id(1), ..message(&bob, b"hello") };
    let first = alice.ok::<methods::Enqueue>(one.clone()).await;
    let batch = send(&alice, list(vec![one])).await;
    let v1::BatchResult { seq, duplicate, delivery_proof, .. } = &batch.results[0];
    assert_eq!((*seq, *duplicate, delivery_proof), (first.seq, true, &first.delivery_proof));
}

#[tokio::test]
async fn a_thousand_messages_arrive_in_their_order() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let numbered =
        |n: u32| EnqueueRequest { payload: n.to_be_bytes().to_vec().into(), ..message(&bob, b"") };
    let response = send(&alice, list((1..=1_000).map(numbered).collect())).await;
    assert_eq!(response.seqs, (1..=1_000).collect::<Vec<_>>());
    let fetched = fetch(&bob).await.arrived().await;
    assert_eq!(seqs(&fetched.payloads), response.seqs);
    for envelope in &fetched.payloads {
        assert_eq!(envelope.data, u32::try_from(envelope.seq).expect("small").to_be_bytes()[..]);
    }
    assert!(!fetched.more);
}
