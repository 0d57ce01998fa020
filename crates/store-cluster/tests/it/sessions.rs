//! Sessions over several edges: a session that one edge ends is invalid on all, also without Redis
//! and NATS.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use qpq_domain::{StoreLimits, TokenHash};
use qpq_ports::{AccountEvent, PasswordChange, PasswordChanged, Session, Stores};
use qpq_store_cluster::{Config, Timing};
use qpq_test_services::resp::Reply;
use tokio::time::timeout;

use crate::{
    backend::{Process, Servers, edge, eventually},
    people::{HOUR, NOW, Person, open, person, token},
};

/// Longer than any of these tests, so a missing copy was removed and did not expire.
const LONG: Duration = Duration::from_secs(10 * 60);
/// Short enough for a test to wait until a copy is too old.
const BRIEF: Duration = Duration::from_secs(2);

/// Creates a cluster in which copies of sessions are valid for `session_cache`.
async fn cluster(session_cache: Duration) -> (Arc<Servers>, Config) {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let timing = Timing { session_cache, ..config.timing };
    (servers, Config { timing, ..config })
}

async fn find(stores: &Stores, n: u8) -> Option<Session> {
    stores.sessions.find(&token(n)).await.expect("find")
}

async fn revoke(stores: &Stores, n: u8) -> u32 {
    stores.sessions.revoke(&token(n)).await.expect("revoke")
}

async fn is_over(stores: &Stores, n: u8) {
    eventually("a session to be over", || async { find(stores, n).await.is_none() }).await;
}

/// Waits until `to` receives an event of `from`, because a subscription takes effect after some
/// time.
async fn receive_each_other_s_messages(from: &Stores, to: &Stores, person: Person) {
    let mut events = to.account_events.listen();
    loop {
        from.account_events.publish(&person.identity, AccountEvent::KeyPackageTaken);
        if let Ok(event) = timeout(Duration::from_millis(100), events.next()).await {
            assert_eq!(event, Some((person.identity, AccountEvent::KeyPackageTaken)));
            return;
        }
    }
}

/// Returns the key in Redis of the copy of the session with this number.
fn copy_of(config: &Config, n: u8) -> String {
    let hex: String = token(n).as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}:s:{hex}", config.namespace)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_at_one_edge_reaches_the_others() {
    let (_servers, config) = cluster(LONG).await;
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    let alice = person(&a, 1).await;
    receive_each_other_s_messages(&a, &b, alice).await;
    let mut opened = Vec::new();
    for n in 1..=3 {
        opened.push(open(&a, n, alice).await);
        assert_eq!(find(&b, n).await.as_ref(), opened.last(), "B has a copy now");
    }
    assert_eq!(revoke(&a, 1).await, 1);
    is_over(&b, 1).await;
    assert_eq!(find(&b, 2).await.as_ref(), Some(&opened[1]));

    assert_eq!(a.sessions.revoke_all(alice.account).await.expect("revoke"), 2);
    is_over(&b, 2).await;
    is_over(&b, 3).await;
    assert_eq!(b.sessions.revoke_all(alice.account).await.expect("revoke"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_password_ends_the_other_sessions_at_every_edge_within_a_second() {
    let (_servers, config) = cluster(LONG).await;
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    let alice = person(&a, 1).await;
    receive_each_other_s_messages(&a, &b, alice).await;
    for n in 1..=3 {
        open(&a, n, alice).await;
        assert!(find(&b, n).await.is_some(), "B has a copy now");
    }
    let change =
        PasswordChange { account: alice.account, session: token(1), opaque_record: vec![7; 192] };
    let changed = a.accounts.change_password(change).await.expect("change");
    assert_eq!(changed, PasswordChanged::Changed { ended_sessions: 2 });
    let ended = async {
        is_over(&b, 2).await;
        is_over(&b, 3).await;
    };
    timeout(Duration::from_secs(1), ended).await.expect("within a second");
    for stores in [&a, &b] {
        assert!(find(stores, 1).await.is_some(), "the session that changed the password stays");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_nats_a_copy_is_valid_for_a_while() {
    let (servers, config) = cluster(BRIEF).await;
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    let alice = person(&a, 1).await;
    let opened = open(&a, 1, alice).await;
    servers.nats.kill9().await.expect("NATS");
    assert_eq!(find(&b, 1).await, Some(opened));
    assert_eq!(revoke(&a, 1).await, 1);
    assert_eq!(find(&a, 1).await, None);
    assert_eq!(
        b.sessions.confirm(&token(1)).await.expect("confirm"),
        None,
        "a confirmation reads Postgres"
    );
    is_over(&b, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_drops_all_copies_when_nats_reconnects() {
    let (servers, config) = cluster(LONG).await;
    let one = Process::start(&config).await;
    let two = edge(&config).await;
    let (a, b) = (one.store.stores(), two.stores());
    let alice = person(&a, 1).await;
    let opened = open(&a, 1, alice).await;
    assert_eq!(find(&b, 1).await, Some(opened.clone()));
    servers.nats.kill9().await.expect("NATS");
    assert_eq!(revoke(&a, 1).await, 1);
    // The message about the revocation, which this edge could not send, is lost with the edge.
    one.crash().await;
    assert_eq!(find(&b, 1).await, Some(opened), "no message has reached it");
    servers.nats.start_again().await.expect("NATS");
    is_over(&b, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lookups_that_race_with_a_revocation_leave_no_copy() {
    let (_servers, config) = cluster(LONG).await;
    let (one, two, three) = (edge(&config).await, edge(&config).await, edge(&config).await);
    let (a, b, c) = (one.stores(), two.stores(), three.stores());
    let alice = person(&a, 1).await;
    receive_each_other_s_messages(&a, &b, alice).await;
    for n in 0..100 {
        open(&a, n, alice).await;
        let finders: Vec<_> = [&a, &b, &b, &a, &b]
            .into_iter()
            .map(|stores| {
                let sessions = Arc::clone(&stores.sessions);
                tokio::spawn(async move { sessions.find(&token(n)).await.expect("find") })
            })
            .collect();
        assert_eq!(revoke(&a, n).await, 1);
        assert_eq!(find(&a, n).await, None, "round {n}");
        assert_eq!(find(&c, n).await, None, "round {n}: Redis has no copy either");
        for finder in finders {
            finder.await.expect("no panic");
        }
        is_over(&b, n).await;
        assert_eq!(find(&a, n).await, None, "round {n}");
        assert_eq!(find(&c, n).await, None, "round {n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushed_redis_ends_no_session_and_brings_none_back() {
    let (servers, config) = cluster(LONG).await;
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    let alice = person(&a, 1).await;
    receive_each_other_s_messages(&a, &b, alice).await;
    let (kept, _) = (open(&a, 1, alice).await, open(&a, 2, alice).await);
    find(&b, 2).await.expect("B has a copy now");
    servers.redis.flush_all().await.expect("Redis");
    assert_eq!(find(&a, 1).await, Some(kept.clone()));
    assert_eq!(revoke(&a, 2).await, 1);
    // The mark of the session's end is lost, too.
    servers.redis.flush_all().await.expect("Redis");
    is_over(&b, 2).await;
    let three = edge(&config).await;
    assert_eq!(find(&three.stores(), 2).await, None);
    assert_eq!(find(&three.stores(), 1).await, Some(kept));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_was_rolled_back_brings_no_session_back() {
    let (servers, config) = cluster(BRIEF).await;
    let one = edge(&config).await;
    let a = one.stores();
    let alice = person(&a, 1).await;
    let opened = open(&a, 1, alice).await;
    assert_eq!(find(&a, 1).await, Some(opened), "Redis has a copy now");
    // Without an expiry, so that the copy does not expire in Redis first.
    let copy = copy_of(&config, 1);
    assert_eq!(servers.redis.command(["PERSIST", &copy]).await.expect("Redis"), Reply::Integer(1));
    let before = servers.redis.snapshot().await.expect("a dump");
    assert_eq!(revoke(&a, 1).await, 1);
    assert_eq!(find(&a, 1).await, None);
    servers.redis.roll_back_to(&before).await.expect("the dump");

    let two = edge(&config).await;
    let b = two.stores();
    is_over(&b, 1).await;
    assert_eq!(servers.redis.command(["EXISTS", &copy]).await.expect("Redis"), Reply::Integer(1));
    assert_eq!(find(&edge(&config).await.stores(), 1).await, None, "the copy in Redis is not used");
    let alive = open(&b, 2, alice).await;
    assert_eq!(find(&b, 2).await, Some(alive));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_redis_fails_no_lookup_and_no_revocation() {
    let (servers, config) = cluster(BRIEF).await;
    let config = Config { redis_timeout: Duration::from_millis(200), ..config };
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    let alice = person(&a, 1).await;
    let kept = open(&a, 1, alice).await;
    open(&a, 2, alice).await;
    find(&b, 2).await.expect("B has a copy now");
    servers.redis.freeze();
    assert_eq!(find(&a, 1).await, Some(kept.clone()), "while Redis hangs");
    servers.redis.thaw();
    servers.redis.kill9().await.expect("Redis");
    assert_eq!(find(&b, 1).await, Some(kept.clone()), "while Redis is down");
    assert_eq!(revoke(&a, 2).await, 1);
    assert_eq!(find(&a, 2).await, None);
    is_over(&b, 2).await;
    servers.redis.start_again().await.expect("Redis");
    let copy = copy_of(&config, 1);
    eventually("a copy in the new Redis", || async {
        assert_eq!(find(&a, 1).await, Some(kept.clone()));
        servers.redis.command(["EXISTS", &copy]).await.expect("Redis") == Reply::Integer(1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_use_at_one_edge_is_visible_at_the_others() {
    let (_servers, config) = cluster(LONG).await;
    let (one, two) = (edge(&config).await, edge(&config).await);
    let (a, b) = (one.stores(), two.stores());
    let alice = person(&a, 1).await;
    let opened = open(&a, 1, alice).await;
    assert_eq!(find(&a, 1).await, Some(opened.clone()), "Redis has a copy now");
    let (used, expires_at) = (NOW.plus(HOUR / 2), NOW.plus(2 * HOUR));
    let touch = |stores: Stores, token: TokenHash, now| async move {
        stores.sessions.touch(&token, now, expires_at).await.expect("touch");
    };
    touch(a.clone(), token(1), used).await;
    let touched = Session { last_used_at: used, expires_at, ..opened };
    for stores in [&a, &b] {
        assert_eq!(find(stores, 1).await, Some(touched.clone()));
    }
    touch(b.clone(), token(1), NOW.plus(HOUR / 4)).await;
    assert_eq!(
        b.sessions.confirm(&token(1)).await.expect("confirm"),
        Some(touched),
        "the later use counts"
    );
}
