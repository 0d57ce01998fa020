//! A client that asks for more than its share is refused with a reason, and others are not
//! affected.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use prost::Message as _;
use qpq_domain::{AccountId, TokenHash, UnixMillis};
use qpq_ports::{Batch, NewSession, Session, SessionCreation, Sessions, StoreResult};
use qpq_proto::{
    Status,
    methods::{Ack, Enqueue, Fetch, Peek},
    v1::{AckRequest, EnqueueRequest, FetchRequest, PeekRequest, PeekResponse},
};
use qpq_rpc::{Answer, AnswerMemory, Config, RateLimits};

use crate::harness::{Client, Refused, Server, User, code, new_identity};

const MIB: usize = 1 << 20;

/// Configures little memory for answers, and no time to wait for it.
fn little_memory(config: &mut Config) {
    config.answers = AnswerMemory {
        process: 16 * MIB,
        account: 8 * MIB,
        connection: 4 * MIB,
        wait: Duration::ZERO,
    };
}

async fn fill(user: &User, messages: usize, bytes: usize) {
    for _ in 0..messages {
        let request = EnqueueRequest {
            recipient_key: user.identity.as_bytes().to_vec().into(),
            payload: vec![7; bytes].into(),
            ..Default::default()
        };
        user.client.call::<Enqueue>(request).await.expect("space in the inbox");
    }
}

/// Returns the answer to a Peek. The caller keeps it, as the transport does for a client that does
/// not read.
async fn unread(client: &Client) -> Answer {
    let method = <Peek as qpq_proto::Method>::INFO.id;
    client.raw(method, PeekRequest::default().encode_to_vec()).await
}

fn shown(answer: &Answer) -> PeekResponse {
    assert_eq!(answer.status, Status::Ok.code());
    PeekResponse::decode(answer.payload.clone()).expect("a page")
}

#[tokio::test]
async fn unread_answers_of_one_account_are_bounded_and_other_accounts_can_read() {
    let server = Server::with(little_memory).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    fill(&alice, 4, MIB - 1_000).await;
    fill(&bob, 1, 10).await;
    let mut kept = Vec::new();
    for _ in 0..8 {
        let connection = server.connect();
        connection.call_with::<Ack>(AckRequest::default(), &alice.token).await.expect("a session");
        for _ in 0..64 {
            kept.push(unread(&connection).await);
        }
        bob.client.call::<Peek>(PeekRequest::default()).await.expect("bob's own page");
    }
    assert!(server.rpc.answer_bytes() <= 8 * MIB, "{}", server.rpc.answer_bytes());
    let (pages, refusals): (Vec<_>, Vec<_>) =
        kept.iter().partition(|answer| answer.status == Status::Ok.code());
    let held: usize = pages.iter().map(|answer| answer.payload.len()).sum();
    assert!(held <= server.rpc.answer_bytes(), "all that is held is counted");
    for refusal in refusals {
        let refused = Refused::new(refusal);
        assert_eq!(
            (refused.status, refused.code.as_str()),
            (Status::RateLimited, "rpc.unread_answers")
        );
        assert!(refused.retry_after.is_some());
    }
    // Once the answers are read, their memory is free, and no message is lost.
    kept.clear();
    assert_eq!(server.rpc.answer_bytes(), 0);
    assert_eq!(shown(&unread(&alice.client).await).payloads.len(), 4);
}

#[tokio::test]
async fn a_page_is_smaller_while_memory_is_short_and_reports_more() {
    let server = Server::with(|config| {
        little_memory(config);
        config.delivery.max_payload = 100_000;
    })
    .await;
    let alice = server.user("alice").await;
    fill(&alice, 40, 100_000).await;
    let first = unread(&alice.client).await;
    let second = unread(&alice.client).await;
    let (first, second) = (shown(&first), shown(&second));
    assert!(first.payloads.len() > second.payloads.len(), "{}", second.payloads.len());
    assert!(second.more && !second.payloads.is_empty());
}

#[tokio::test]
async fn a_dropped_fetch_answer_returns_its_memory_and_messages() {
    let server = Server::with(little_memory).await;
    let alice = server.user("alice").await;
    fill(&alice, 4, MIB - 1_000).await;
    let method = <Fetch as qpq_proto::Method>::INFO.id;
    let answer = alice.client.raw(method, FetchRequest::default().encode_to_vec()).await;
    let Answer { payload, lease, .. } = answer;
    assert!(lease.is_some() && !payload.is_empty());
    let slice = payload.slice(..1);
    drop(payload);
    assert!(server.rpc.answer_bytes() > MIB, "a slice keeps the whole");
    drop((slice, lease));
    assert_eq!(server.rpc.answer_bytes(), 0);
    assert_eq!(shown(&unread(&alice.client).await).payloads.len(), 4);
}

#[tokio::test]
async fn a_process_without_memory_for_answers_refuses_reads_and_recovers() {
    let server = Server::with(little_memory).await;
    let mut users = Vec::new();
    for name in ["alice", "bob", "carol", "dave", "eve"] {
        let user = server.user(name).await;
        fill(&user, 8, MIB - 1_000).await;
        users.push(user);
    }
    let mut kept = Vec::new();
    for user in &users {
        for _ in 0..2 {
            let connection = server.connect();
            let bound = connection.call_with::<Ack>(AckRequest::default(), &user.token);
            bound.await.expect("a session");
            for _ in 0..4 {
                kept.push(unread(&connection).await);
            }
        }
    }
    assert!(server.rpc.is_short_of_memory());
    assert!(server.rpc.answer_bytes() <= 16 * MIB);
    let full = Refused::new(&unread(&users[4].client).await);
    assert_eq!((full.status, full.code.as_str()), (Status::Unavailable, "rpc.answers_full"));
    assert!(full.retry_after.is_some());
    // Calls without large answers succeed.
    fill(&users[4], 1, 10).await;
    kept.clear();
    assert!(!server.rpc.is_short_of_memory());
    assert_eq!(shown(&unread(&users[4].client).await).payloads.len(), 4);
}

#[tokio::test]
async fn a_stored_message_above_a_reduced_maximum_can_be_read() {
    let server = Server::with(|config| {
        little_memory(config);
        config.answers.process = 8 * MIB;
        config.delivery.max_payload = 1_000;
    })
    .await;
    let alice = server.user("alice").await;
    let payload = Bytes::from(vec![7; 3 * MIB]);
    let message = qpq_ports::NewMessage {
        sender: alice.identity,
        recipient: alice.identity,
        channel: qpq_domain::ChannelId::DEFAULT,
        payload,
        payload_sha256: [0; 32],
        message_id: None,
        now: crate::harness::START,
        ttl: Duration::from_secs(60),
    };
    server.store.stores().inboxes.enqueue(Batch::new(vec![message])).await.expect("stored");
    // A page gets a quarter of the free memory, which is less than the size of the message.
    let answer = unread(&alice.client).await;
    assert_eq!(shown(&answer).payloads.len(), 1);
    assert!(server.rpc.answer_bytes() >= 3 * MIB);
}

/// Counts the look-ups of sessions.
struct Counted {
    inner: Arc<dyn Sessions>,
    lookups: Arc<AtomicUsize>,
}

#[async_trait]
impl Sessions for Counted {
    async fn create(&self, session: NewSession) -> StoreResult<SessionCreation> {
        self.inner.create(session).await
    }

    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        self.inner.find(token).await
    }

    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        self.inner.confirm(token).await
    }

    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()> {
        self.inner.touch(token, now, expires_at).await
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        self.inner.revoke(token).await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        self.inner.revoke_all(account).await
    }
}

async fn fetch(client: &Client, token: &[u8]) -> Result<(), Refused> {
    client.call_with::<Fetch>(FetchRequest::default(), token).await.map(drop)
}

#[tokio::test]
async fn guessed_tokens_of_one_address_are_limited_without_a_look_up() {
    let lookups = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&lookups);
    let server = Server::with_stores(
        |config| config.limits = RateLimits::default(),
        |mut stores| {
            stores.sessions = Arc::new(Counted { inner: stores.sessions, lookups: counter });
            stores
        },
    )
    .await;
    // Alice has the same address as the guesser.
    let alice = server.user("alice").await;
    fetch(&alice.client, &alice.token).await.expect("a session");
    lookups.store(0, Ordering::SeqCst);
    let mallory = server.connect();
    let mut codes = std::collections::BTreeMap::<_, u32>::new();
    for n in 0..12_000_u32 {
        let mut token = [0xa5; 32];
        token[..4].copy_from_slice(&n.to_be_bytes());
        let (status, code) = code(fetch(&mallory, &token).await);
        *codes.entry((status.code(), code)).or_default() += 1;
    }
    let expected = [
        ((Status::Unauthorized.code(), "auth.session_expired".to_owned()), 300),
        ((Status::RateLimited.code(), "rpc.rate_limited".to_owned()), 11_700),
    ];
    assert_eq!(codes, expected.into());
    assert_eq!(lookups.load(Ordering::SeqCst), 300);

    fetch(&alice.client, &alice.token).await.expect("the connection's session");
    fetch(&server.connect(), &alice.token).await.expect("a token that this edge knows");
    let elsewhere = server.connect_from((IpAddr::from([192, 0, 2, 1]), 1).into());
    assert_eq!(code(fetch(&elsewhere, &[1; 32]).await).0, Status::Unauthorized);
    let refused = fetch(&mallory, &[2; 32]).await.expect_err("still limited");
    server.clock.advance(refused.retry_after.expect("always set"));
    assert_eq!(code(fetch(&mallory, &[2; 32]).await).0, Status::Unauthorized);
}

#[tokio::test]
async fn a_repeated_unknown_token_costs_one_look_up() {
    let lookups = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&lookups);
    let server = Server::with_stores(
        |_| {},
        |mut stores| {
            stores.sessions = Arc::new(Counted { inner: stores.sessions, lookups: counter });
            stores
        },
    )
    .await;
    let client = server.connect();
    for _ in 0..100 {
        assert_eq!(code(fetch(&client, &[9; 32]).await).1, "auth.session_expired");
    }
    assert_eq!(lookups.load(Ordering::SeqCst), 1);
}

fn at(last: u8) -> SocketAddr {
    (IpAddr::from([192, 0, 2, last]), 4433).into()
}

#[tokio::test]
async fn guesses_at_a_username_do_not_lock_its_owner_out_at_another_address() {
    let server = Server::with(|config| config.limits = RateLimits::default()).await;
    server.connect().register("alice", "password", &new_identity()).await.expect("a free name");
    let (mallory, alice) = (server.connect_from(at(1)), server.connect_from(at(2)));
    let mut guesses = 0;
    for second in 0..54 {
        for _ in 0..2 {
            guesses += u32::from(mallory.start_login("alice", "guess").await.is_ok());
        }
        if second % 3 == 2 {
            alice.log_in("alice", "password").await.expect("the right password");
        }
        server.clock.advance(Duration::from_secs(1));
    }
    assert!(guesses <= 20 + 20, "{guesses}");
}

#[tokio::test]
async fn guesses_from_many_addresses_are_bounded_and_do_not_lock_out_a_known_address() {
    let server = Server::with(|config| config.limits = RateLimits::default()).await;
    server.connect().register("alice", "password", &new_identity()).await.expect("a free name");
    server.connect_from(at(1)).log_in("alice", "password").await.expect("the right password");
    for name in ["alice", "nobody"] {
        let mut guesses = 0;
        for address in 10..60 {
            let stranger = server.connect_from(at(address));
            for _ in 0..3 {
                guesses += u32::from(stranger.start_login(name, "guess").await.is_ok());
            }
        }
        // The owner's first login has consumed one of the 60.
        assert_eq!(guesses, if name == "alice" { 59 } else { 60 });
    }
    server.connect_from(at(1)).log_in("alice", "password").await.expect("a known address");
    let refused = server.connect_from(at(70)).start_login("alice", "password").await.err();
    assert_eq!(refused.map(|refused| refused.code).as_deref(), Some("rpc.rate_limited"));
}

#[tokio::test]
async fn a_username_is_limited_equally_whether_or_not_it_exists() {
    let server = Server::with(|config| config.limits = RateLimits::default()).await;
    server.connect().register("alice", "password", &new_identity()).await.expect("a free name");
    server.connect_from(at(1)).log_in("alice", "password").await.expect("the right password");
    server.connect_from(at(1)).start_login("nobody", "password").await.expect("the same answer");
    let mut outcomes = Vec::new();
    for name in ["alice", "nobody"] {
        let client = server.connect_from(at(1));
        let mut waits = Vec::new();
        for _ in 0..25 {
            let started = client.start_login(name, "guess").await;
            waits.push(started.err().map(|refused| (refused.code, refused.retry_after)));
        }
        outcomes.push(waits);
    }
    assert_eq!(outcomes[0], outcomes[1]);
    assert!(outcomes[0][18].is_none() && outcomes[0][19].is_some(), "{:?}", outcomes[0]);
}
