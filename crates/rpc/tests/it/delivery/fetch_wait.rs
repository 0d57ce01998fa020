//! FetchWait (202).

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use qpq_proto::{
    Status, methods,
    v1::{self, EnqueueRequest, FetchWaitRequest, LogoutRequest},
};
use tokio::task::JoinHandle;

use super::{CHANNEL, OTHER_CHANNEL, bodies, fetch, peek_all};
use crate::{
    harness::{Refused, Server, User},
    user::{OkAnswer, message},
    waiters::Waiters,
};

type Waited = Result<OkAnswer<v1::FetchWaitResponse>, Refused>;

/// Waits for the default channel with the maximum timeout.
fn wait(user: User) -> JoinHandle<Waited> {
    wait_for(user, FetchWaitRequest { timeout_ms: u64::MAX, ..Default::default() })
}

fn wait_for(user: User, request: FetchWaitRequest) -> JoinHandle<Waited> {
    tokio::spawn(async move { user.ask::<methods::FetchWait>(request).await })
}

async fn answered(waiting: JoinHandle<Waited>) -> OkAnswer<v1::FetchWaitResponse> {
    waiting.await.expect("no panic").expect("an answer")
}

#[tokio::test]
async fn a_queued_message_is_answered_immediately() {
    let server = Server::start().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    let request = FetchWaitRequest::default();
    assert_eq!(bodies(&user.ok::<methods::FetchWait>(request).await.payloads), [b"one"]);
    assert!(peek_all(&user).await.payloads.is_empty());
}

#[tokio::test]
async fn a_message_that_arrives_while_waiting_is_answered_and_kept_until_delivered() {
    let (server, waiters) = Waiters::server().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let waiting = wait(bob.elsewhere(&server));
    waiters.waited(1).await;
    alice.send(&bob, b"one").await;
    let lost = answered(waiting).await;
    assert_eq!(bodies(&lost.response.payloads), [b"one"]);
    drop(lost);
    assert_eq!(bodies(&fetch(&bob).await.arrived().await.payloads), [b"one"]);
    waiters.subscribed(0).await;
}

#[tokio::test]
async fn messages_of_other_channels_do_not_end_the_wait() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let waiting = wait(user.elsewhere(&server));
    waiters.waited(1).await;
    let elsewhere = EnqueueRequest { channel_id: CHANNEL, ..message(&user, b"elsewhere") };
    user.ok::<methods::Enqueue>(elsewhere).await;
    user.send(&user, b"here").await;
    assert_eq!(bodies(&answered(waiting).await.response.payloads), [b"here"]);
    assert_eq!(waiters.leases(), 2, "one when it began to wait, one for the message here");
}

#[tokio::test]
async fn a_lost_answer_wakes_the_next_waiting_call() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    user.send(&user, b"one").await;
    let under_way = fetch(&user).await;
    let waiting = wait(user.elsewhere(&server));
    waiters.waited(1).await;
    drop(under_way);
    assert_eq!(bodies(&answered(waiting).await.response.payloads), [b"one"]);
}

#[tokio::test]
async fn of_two_waiting_calls_each_receives_one_of_two_messages() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let (first, second) = (wait(user.elsewhere(&server)), wait(user.elsewhere(&server)));
    waiters.leased(2).await;
    user.send(&user, b"one").await;
    let (one, rest) = futures_util::future::select(first, second).await.factor_first();
    let one = one.expect("no panic").expect("an answer");
    assert_eq!(bodies(&one.response.payloads), [b"one"]);
    assert!(one.arrived().await.payloads.len() == 1);
    user.send(&user, b"two").await;
    assert_eq!(bodies(&answered(rest.into_inner()).await.response.payloads), [b"two"]);
}

fn nothing(server: &Server) -> v1::FetchWaitResponse {
    v1::FetchWaitResponse { store_id: server.store_id(), ..Default::default() }
}

#[tokio::test]
async fn a_ninth_waiting_call_of_a_reader_ends_the_oldest_empty() {
    let (server, waiters) = Waiters::server().await;
    let (user, other) = (server.user("reader").await, server.user("other").await);
    let in_channel = |channel_id: &Bytes| FetchWaitRequest {
        channel_id: channel_id.clone(),
        timeout_ms: u64::MAX,
        ..Default::default()
    };
    // The limit counts the calls for all channels.
    let channels = [CHANNEL, OTHER_CHANNEL, Bytes::new()];
    let mut waits = VecDeque::new();
    for n in 0..8 {
        waits.push_back(wait_for(user.elsewhere(&server), in_channel(&channels[n % 3])));
        waiters.leased(n + 1).await;
    }
    let others = wait(other.elsewhere(&server));
    waiters.leased(9).await;
    for n in 0..6 {
        waits.push_back(wait_for(user.elsewhere(&server), in_channel(&channels[n % 3])));
        let oldest = answered(waits.pop_front().expect("a wait")).await;
        assert!(oldest.response.payloads.is_empty());
    }
    // The newest eight still wait, for the three channels in turn.
    assert_eq!(waits.len(), 8);
    waiters.leased(15).await;
    for channel_id in &channels {
        let request = EnqueueRequest { channel_id: channel_id.clone(), ..message(&user, b"one") };
        user.ok::<methods::Enqueue>(request).await;
    }
    let mut with_a_message = 0;
    while with_a_message < 3 {
        let (ended, _, rest) = futures_util::future::select_all(waits.drain(..)).await;
        let ended = ended.expect("no panic").expect("an answer");
        assert_eq!(bodies(&ended.response.payloads), [b"one"]);
        ended.arrived().await;
        waits.extend(rest);
        with_a_message += 1;
    }
    other.send(&other, b"one").await;
    assert_eq!(bodies(&answered(others).await.response.payloads), [b"one"]);
}

#[tokio::test]
async fn a_message_costs_one_read_for_any_number_of_waiting_calls() {
    let (server, waiters) = Waiters::server().await;
    let (user, alice) = (server.user("reader").await, server.user("alice").await);
    let mut waits: VecDeque<_> = (0..8).map(|_| wait(user.elsewhere(&server))).collect();
    waiters.leased(8).await;
    for _ in 0..27 {
        let elsewhere = EnqueueRequest { channel_id: CHANNEL, ..message(&user, b"elsewhere") };
        alice.ok::<methods::Enqueue>(elsewhere).await;
    }
    alice.send(&user, b"here").await;
    // One call receives the message, and the others still wait.
    let (first, _, rest) = futures_util::future::select_all(waits.drain(..)).await;
    let first = first.expect("no panic").expect("an answer");
    assert_eq!(bodies(&first.response.payloads), [b"here"]);
    assert_eq!(waiters.leases(), 9);
    drop(first);
    let (again, _, rest) = futures_util::future::select_all(rest).await;
    let again = again.expect("no panic").expect("an answer");
    assert_eq!(bodies(&again.response.payloads), [b"here"], "it was released to the next");
    assert_eq!(waiters.leases(), 10);
    again.arrived().await;
    server.rpc.drain();
    for waiting in rest {
        assert!(answered(waiting).await.response.payloads.is_empty());
    }
}

#[tokio::test]
async fn hundreds_of_waiting_calls_of_one_account_do_not_delay_others() {
    let (server, waiters) = Waiters::server().await;
    let (greedy, bob) = (server.user("greedy").await, server.user("bob").await);
    let nowhere =
        FetchWaitRequest { channel_id: CHANNEL, timeout_ms: u64::MAX, ..Default::default() };
    let mut waits: Vec<_> =
        (0..960).map(|_| wait_for(greedy.elsewhere(&server), nowhere.clone())).collect();
    waiters.leased(960).await;
    for n in 0..173 {
        bob.send(&greedy, b"elsewhere").await;
        if n % 10 == 0 {
            assert!(peek_all(&bob).await.payloads.is_empty());
        }
    }
    assert_eq!(waiters.leases(), 960, "none of 173 messages caused a read");
    server.rpc.drain();
    for waiting in waits.drain(..) {
        assert!(answered(waiting).await.response.payloads.is_empty());
    }
    assert_eq!(peek_all(&greedy).await.payloads.len(), 173);
    waiters.subscribed(0).await;
}

#[tokio::test]
async fn without_a_message_the_answer_is_empty_at_the_timeout() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let briefly = FetchWaitRequest { timeout_ms: 1, ..Default::default() };
    let answer = answered(wait_for(user.elsewhere(&server), briefly)).await;
    assert_eq!(answer.response, nothing(&server));
    assert!(answer.lease.is_none());
    waiters.subscribed(0).await;
}

#[tokio::test]
async fn a_drain_ends_all_waiting_calls_and_no_new_one_waits() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let waiting: Vec<_> = (0..5).map(|_| wait(user.elsewhere(&server))).collect();
    waiters.leased(5).await;
    server.rpc.drain();
    for waiting in waiting {
        assert_eq!(answered(waiting).await.response, nothing(&server));
    }
    server.rpc.drained().await;
    assert_eq!(answered(wait(user.elsewhere(&server))).await.response, nothing(&server));
    // Queued messages are still answered.
    user.send(&user, b"one").await;
    assert_eq!(bodies(&answered(wait(user)).await.response.payloads), [b"one"]);
}

#[tokio::test]
async fn a_cancelled_call_frees_its_subscription() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let waiting = wait(user.elsewhere(&server));
    waiters.waited(1).await;
    waiting.abort();
    assert!(waiting.await.expect_err("it waited").is_cancelled());
    waiters.subscribed(0).await;
    user.send(&user, b"one").await;
    assert_eq!(bodies(&fetch(&user).await.arrived().await.payloads), [b"one"]);
}

#[tokio::test]
async fn a_call_cancelled_between_message_and_answer_loses_nothing() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    for round in 0..50 {
        let waiting = wait(user.elsewhere(&server));
        waiters.waited(round + 1).await;
        let seq = user.send(&user, b"one").await.seq;
        // Cancel between the wake and the answer, or after the answer.
        for _ in 0..round % 5 {
            tokio::task::yield_now().await;
        }
        waiting.abort();
        drop(waiting.await);
        let fetched = fetch(&user).await.arrived().await;
        assert_eq!(fetched.payloads.iter().map(|e| e.seq).collect::<Vec<_>>(), [seq]);
        waiters.subscribed(0).await;
    }
}

#[tokio::test]
async fn a_revoked_session_ends_its_waiting_calls_and_no_others() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let mut other = user.elsewhere(&server);
    other.token =
        other.client.log_in("reader", "password").await.expect("the right password").session_token;

    let waiting = wait(user.elsewhere(&server));
    waiters.waited(1).await;
    let stays = wait(other.elsewhere(&server));
    waiters.leased(2).await;
    user.ok::<methods::Logout>(LogoutRequest::default()).await;
    let refused = waiting.await.expect("no panic").expect_err("the session is over");
    refused.assert(Status::Unauthorized, "auth.session_expired");

    other.send(&other, b"for who stays").await;
    assert_eq!(bodies(&answered(stays).await.arrived().await.payloads), [b"for who stays"]);
    waiters.subscribed(0).await;

    // All sessions are revoked by a session other than that of the waiting call.
    let another =
        user.client.log_in("reader", "password").await.expect("the right password").session_token;
    let waiting = wait(other.elsewhere(&server));
    waiters.subscribed(1).await;
    let everywhere = LogoutRequest { all_sessions: true, ..Default::default() };
    user.client.call_with::<methods::Logout>(everywhere, &another).await.expect("a session");
    let refused = waiting.await.expect("no panic").expect_err("the session is over");
    refused.assert(Status::Unauthorized, "auth.session_expired");
}

#[tokio::test]
async fn a_session_that_ends_before_a_message_does_not_receive_it() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    let mut other = user.elsewhere(&server);
    other.token =
        other.client.log_in("reader", "password").await.expect("the right password").session_token;
    let waiting = wait(user.elsewhere(&server));
    waiters.waited(1).await;
    user.ok::<methods::Logout>(LogoutRequest::default()).await;
    other.send(&other, b"too late").await;
    waiting.await.expect("no panic").expect_err("the session is over");
    assert_eq!(bodies(&fetch(&other).await.response.payloads), [b"too late"]);
}

#[tokio::test]
async fn a_message_that_expires_before_the_read_is_not_delivered() {
    let (server, waiters) = Waiters::server().await;
    let user = server.user("reader").await;
    user.ok::<methods::Enqueue>(EnqueueRequest { ttl_secs: 1, ..message(&user, b"short-lived") })
        .await;
    let under_way = fetch(&user).await;
    let waiting = wait(user.elsewhere(&server));
    waiters.waited(1).await;
    server.clock.advance(Duration::from_secs(1));
    drop(under_way);
    waiters.waited(2).await;
    user.send(&user, b"fresh").await;
    assert_eq!(bodies(&answered(waiting).await.response.payloads), [b"fresh"]);
}

/// With a lost wake the call would end empty at its timeout of a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_wake_is_lost_in_any_order_of_message_and_wait() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    for round in 0..200 {
        let waiting = wait(bob.elsewhere(&server));
        if round % 2 == 0 {
            tokio::task::yield_now().await;
        }
        let seq = alice.send(&bob, b"ping").await.seq;
        let answer = answered(waiting).await.arrived().await;
        assert_eq!(
            answer.payloads.iter().map(|e| e.seq).collect::<Vec<_>>(),
            [seq],
            "round {round}"
        );
    }
}
