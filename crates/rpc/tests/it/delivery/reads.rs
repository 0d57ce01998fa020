//! Fetch (201), Peek (203) and Ack (204), and the rules that FetchWait (202) shares with them.

use bytes::Bytes;
use qpq_proto::{
    Status, methods,
    v1::{self, AckRequest, EnqueueRequest, FetchRequest, FetchWaitRequest, PeekRequest},
};

use super::{CHANNEL, OTHER_CHANNEL, bodies, fetch, peek_all, seqs};
use crate::{
    harness::{Refused, Server, User},
    user::message,
};

/// Sends messages 1 to 6, by turns in the default channel and in two others.
async fn three_channels(server: &Server) -> User {
    let user = server.user("reader").await;
    for body in [&b"one"[..], b"four"] {
        for channel_id in [Bytes::new(), CHANNEL, OTHER_CHANNEL] {
            let request =
                EnqueueRequest { channel_id, payload: body.into(), ..message(&user, b"") };
            user.ok::<methods::Enqueue>(request).await;
        }
    }
    user
}

async fn ack(user: &User, request: AckRequest) -> u32 {
    user.ok::<methods::Ack>(request).await.removed
}

#[tokio::test]
async fn a_delivered_fetch_removes_its_messages() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    for body in [&b"one"[..], b"two", b"three"] {
        alice.send(&bob, body).await;
    }
    let first = FetchRequest { limit: 2, ..Default::default() };
    let first = bob.ok::<methods::Fetch>(first).await;
    assert_eq!(
        (bodies(&first.payloads), seqs(&first.payloads)),
        (vec![&b"one"[..], b"two"], vec![1, 2])
    );
    assert!(first.more);
    let rest = bob.ok::<methods::Fetch>(FetchRequest::default()).await;
    assert_eq!(bodies(&rest.payloads), [b"three"]);
    assert!(!rest.more);
    let nothing = v1::FetchResponse { store_id: server.store_id(), ..Default::default() };
    assert_eq!(bob.ok::<methods::Fetch>(FetchRequest::default()).await, nothing);
}

#[tokio::test]
async fn messages_of_a_lost_fetch_are_delivered_again() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.send(&bob, b"one").await;
    alice.send(&bob, b"two").await;
    let first = fetch(&bob).await;
    assert!(first.lease.is_some());
    drop(first.lease);
    let second = fetch(&bob).await;
    assert_eq!(second.response, first.response);
    // A read on another connection returns them, too.
    drop(second.lease);
    assert_eq!(fetch(&bob.elsewhere(&server)).await.arrived().await, first.response);
    assert!(fetch(&bob).await.response.payloads.is_empty());
}

#[tokio::test]
async fn leased_messages_are_hidden_from_other_reads() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.send(&bob, b"one").await;
    let under_way = fetch(&bob).await;
    // Later messages are hidden too, so that they do not overtake leased ones.
    alice.send(&bob, b"two").await;
    let elsewhere = bob.elsewhere(&server);
    let nothing = fetch(&elsewhere).await;
    assert!(nothing.response.payloads.is_empty() && nothing.lease.is_none());
    assert!(peek_all(&elsewhere).await.payloads.is_empty());
    let briefly = FetchWaitRequest { timeout_ms: 1, ..Default::default() };
    assert!(elsewhere.ok::<methods::FetchWait>(briefly).await.payloads.is_empty());

    drop(under_way);
    assert_eq!(bodies(&peek_all(&elsewhere).await.payloads), [b"one", b"two"]);
}

#[tokio::test]
async fn a_read_sees_one_channel_or_all_in_seq_order() {
    let server = Server::start().await;
    let user = three_channels(&server).await;
    let in_channel = PeekRequest { channel_id: CHANNEL, ..Default::default() };
    assert_eq!(seqs(&user.ok::<methods::Peek>(PeekRequest::default()).await.payloads), [1, 4]);
    assert_eq!(seqs(&user.ok::<methods::Peek>(in_channel).await.payloads), [2, 5]);
    let all = peek_all(&user).await;
    assert_eq!(seqs(&all.payloads), [1, 2, 3, 4, 5, 6]);
    assert_eq!(all.payloads[2].channel_id, OTHER_CHANNEL);

    let in_channel = FetchRequest { channel_id: CHANNEL, ..Default::default() };
    assert_eq!(seqs(&user.ok::<methods::Fetch>(in_channel).await.payloads), [2, 5]);
    let waiting = FetchWaitRequest { channel_id: OTHER_CHANNEL, limit: 1, ..Default::default() };
    let waited = user.ok::<methods::FetchWait>(waiting).await;
    assert_eq!((seqs(&waited.payloads), waited.more), (vec![3], true));
    let all = FetchRequest { all_channels: true, channel_id: CHANNEL, ..Default::default() };
    assert_eq!(seqs(&user.ok::<methods::Fetch>(all).await.payloads), [1, 4, 6]);
}

#[tokio::test]
async fn a_peek_removes_nothing_and_starts_after_the_given_seq() {
    let server = Server::start().await;
    let user = three_channels(&server).await;
    for _ in 0..2 {
        let some = PeekRequest { all_channels: true, after_seq: 2, limit: 3, ..Default::default() };
        let page = user.ok::<methods::Peek>(some).await;
        assert_eq!((seqs(&page.payloads), page.more), (vec![3, 4, 5], true));
    }
    let after = |after_seq| PeekRequest { after_seq, ..Default::default() };
    assert_eq!(seqs(&user.ok::<methods::Peek>(after(1)).await.payloads), [4]);
    let nothing = v1::PeekResponse { store_id: server.store_id(), ..Default::default() };
    assert_eq!(user.ok::<methods::Peek>(after(4)).await, nothing);
    assert_eq!(user.ok::<methods::Peek>(after(u64::MAX)).await, nothing);
}

#[tokio::test]
async fn an_ack_removes_messages_up_to_a_seq_and_single_ones_of_its_view() {
    let server = Server::start().await;
    let user = three_channels(&server).await;
    // An empty ack removes nothing.
    assert_eq!(ack(&user, AckRequest { all_channels: true, ..Default::default() }).await, 0);
    // The default channel has 1 and 4; messages of other channels stay.
    assert_eq!(ack(&user, AckRequest { seq_up_to: 3, ..Default::default() }).await, 1);
    assert_eq!(ack(&user, AckRequest { seqs: vec![2, 3], ..Default::default() }).await, 0);
    assert_eq!(
        ack(
            &user,
            AckRequest { channel_id: CHANNEL, seqs: vec![5, 5, 99, 0], ..Default::default() }
        )
        .await,
        1
    );
    assert_eq!(seqs(&peek_all(&user).await.payloads), [2, 3, 4, 6]);
    let all =
        AckRequest { all_channels: true, seq_up_to: 3, seqs: vec![6, 1], ..Default::default() };
    assert_eq!(ack(&user, all.clone()).await, 3);
    assert_eq!(ack(&user, all).await, 0, "a repeat changes nothing");
    assert_eq!(seqs(&peek_all(&user).await.payloads), [4]);
    assert_eq!(
        ack(&user, AckRequest { all_channels: true, seq_up_to: u64::MAX, ..Default::default() })
            .await,
        1
    );
    assert_eq!(user.send(&user, b"next").await.seq, 7, "removing does not bring numbers back");
}

#[tokio::test]
async fn an_ack_removes_leased_messages_too() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    let under_way = fetch(&user).await;
    assert_eq!(
        ack(&user.elsewhere(&server), AckRequest { seq_up_to: 1, ..Default::default() }).await,
        1
    );
    drop(under_way);
    assert!(peek_all(&user).await.payloads.is_empty());
}

#[tokio::test]
async fn an_ack_has_at_most_ten_thousand_seqs() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    assert_eq!(
        ack(&user, AckRequest { seqs: (1..=10_000).collect(), ..Default::default() }).await,
        1
    );
    let too_many = AckRequest { seqs: vec![1; 10_001], ..Default::default() };
    user.refused::<methods::Ack>(too_many).await.assert_field("seqs");
}

#[tokio::test]
async fn a_page_never_exceeds_one_answer() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    for _ in 0..5 {
        let request = EnqueueRequest { payload: vec![7; 1 << 20].into(), ..message(&user, b"") };
        user.ok::<methods::Enqueue>(request).await;
    }
    // This holds for any limit. `User::ask` asserts that each answer fits.
    for limit in [0, 5, u32::MAX] {
        let page = user.ok::<methods::Peek>(PeekRequest { limit, ..Default::default() }).await;
        assert_eq!((seqs(&page.payloads), page.more), (vec![1, 2, 3], true));
    }
    let first = user.ok::<methods::Fetch>(FetchRequest::default()).await;
    assert_eq!((seqs(&first.payloads), first.more), (vec![1, 2, 3], true));
    let rest = user.ok::<methods::FetchWait>(FetchWaitRequest::default()).await;
    assert_eq!((seqs(&rest.payloads), rest.more), (vec![4, 5], false));
}

#[tokio::test]
async fn only_the_owner_reads_an_inbox() {
    let server = Server::start().await;
    let (alice, mallory) = (server.user("alice").await, server.user("mallory").await);
    alice.send(&alice, b"secret").await;
    let victim = alice.key();
    let refusals: [Refused; 4] = [
        mallory
            .refused::<methods::Fetch>(FetchRequest {
                recipient_key: victim.clone(),
                ..Default::default()
            })
            .await,
        mallory
            .refused::<methods::FetchWait>(FetchWaitRequest {
                recipient_key: victim.clone(),
                ..Default::default()
            })
            .await,
        mallory
            .refused::<methods::Peek>(PeekRequest {
                recipient_key: victim.clone(),
                ..Default::default()
            })
            .await,
        mallory
            .refused::<methods::Ack>(AckRequest {
                recipient_key: victim,
                seq_up_to: 9,
                ..Default::default()
            })
            .await,
    ];
    for refused in refusals {
        refused.assert(Status::Forbidden, "delivery.not_owner");
    }

    let named = FetchRequest { recipient_key: alice.key(), ..Default::default() };
    assert_eq!(bodies(&alice.ok::<methods::Fetch>(named).await.payloads), [b"secret"]);
}

#[tokio::test]
async fn fields_of_a_wrong_length_are_refused_by_name() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    let short = Bytes::from_static(b"short");
    macro_rules! refuses {
        ($($method:ident $request:ident)*) => {$(
            for field in ["recipient_key", "channel_id", "device_id"] {
                let mut request = v1::$request::default();
                match field {
                    "recipient_key" => request.recipient_key = short.clone(),
                    "channel_id" => request.channel_id = short.clone(),
                    _ => request.device_id = short.clone(),
                }
                user.refused::<methods::$method>(request).await.assert_field(field);
            }
        )*};
    }
    refuses! { Fetch FetchRequest FetchWait FetchWaitRequest Peek PeekRequest Ack AckRequest }
}

#[tokio::test]
async fn without_registered_devices_any_device_reads_the_one_stream() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    let device_id = Bytes::from_static(&[4; 16]);
    let peek = PeekRequest { device_id: device_id.clone(), ..Default::default() };
    assert_eq!(bodies(&user.ok::<methods::Peek>(peek).await.payloads), [b"one"]);
    let named = FetchRequest { device_id, ..Default::default() };
    assert_eq!(bodies(&user.ok::<methods::Fetch>(named).await.payloads), [b"one"]);
    assert!(peek_all(&user).await.payloads.is_empty());
}

#[tokio::test]
async fn reading_needs_a_session() {
    let server = Server::start().await;
    let stranger = server.connect();
    let refused =
        stranger.call::<methods::Fetch>(FetchRequest::default()).await.expect_err("no session");
    refused.assert(Status::Unauthorized, "auth.session_required");
    let refused = stranger.call_with::<methods::Peek>(PeekRequest::default(), &[7; 32]).await;
    refused.expect_err("no such session").assert(Status::Unauthorized, "auth.session_expired");
}

#[tokio::test]
async fn every_answer_of_a_read_has_the_store_id() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    let first = server.store_id();
    assert_eq!(first.len(), 16);
    assert_eq!(peek_all(&user).await.store_id, first);
    server
        .rpc
        .app()
        .stores
        .maintenance
        .begin_history(qpq_ports::OldSessions::Keep)
        .await
        .expect("another history");
    let second = server.store_id();
    assert_ne!(first, second);
    assert_eq!(peek_all(&user).await.store_id, second);
    let waited = user.ok::<methods::FetchWait>(FetchWaitRequest::default()).await;
    assert_eq!((waited.store_id, waited.payloads.len()), (second.clone(), 1));
    let fetched = user.ok::<methods::Fetch>(FetchRequest::default()).await;
    assert_eq!((fetched.store_id, fetched.payloads.len()), (second, 0));
}

#[tokio::test]
async fn an_ack_of_messages_peeked_in_another_history_removes_nothing() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    let elsewhere = user.elsewhere(&server);
    for reader in [&user, &elsewhere] {
        assert_eq!(seqs(&peek_all(reader).await.payloads), [1]);
    }
    server
        .rpc
        .app()
        .stores
        .maintenance
        .begin_history(qpq_ports::OldSessions::Keep)
        .await
        .expect("another history");
    let first = AckRequest { all_channels: true, seq_up_to: 1, ..Default::default() };
    assert_eq!(ack(&user, first.clone()).await, 0, "seq 1 may be another message now");
    assert_eq!(seqs(&peek_all(&user).await.payloads), [1]);
    assert_eq!(ack(&user, first.clone()).await, 1);
    // A client that peeks on one connection and acks on another is not locked out.
    user.send(&user, b"two").await;
    peek_all(&user).await;
    let second = AckRequest { seq_up_to: 2, ..first };
    assert_eq!(ack(&elsewhere, second.clone()).await, 0);
    assert_eq!(ack(&elsewhere, second).await, 1);
}
