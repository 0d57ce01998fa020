//! Sweeps and enqueues with very many expired rows: the removals of one transaction are bounded,
//! and later ones remove the rest.

use std::{sync::Arc, time::Duration};

use qpq_domain::{ChannelId, IdentityKey, MessageId, StoreLimits};
use qpq_ports::{Batch, Enqueued, NewMessage, PageLimit, ReadQuery, Reader, Stores, View};
use qpq_store_cluster::Config;

use crate::{
    backend::{Servers, edge},
    people::{HOUR, NOW, person},
};

const INBOXES: u8 = 12;
const EXPIRED: u64 = 10_000;

/// Creates `inboxes` inboxes, each full of messages that expired an hour ago.
async fn fill(servers: &Servers, config: &Config, stores: &Stores, inboxes: u8) {
    for n in 0..inboxes {
        person(stores, n).await;
    }
    let sql = format!(
        "INSERT INTO message (inbox, seq, expires_at, enqueued_at, channel, sender, message_id,
                              payload_sha256, payload)
         SELECT i.id, s, {expired}, {expired} - 1, '', sha256('sender'), NULL, sha256('hash'),
                'payload'
           FROM inbox i, generate_series(1, {EXPIRED}) s;
         UPDATE inbox SET last_seq = {EXPIRED}, messages = {EXPIRED}, bytes = {EXPIRED} * 7,
                          next_expiry = {expired};
         ANALYZE",
        expired = NOW.minus(HOUR).0
    );
    servers.postgres.sql_in(&config.namespace, &sql).await.expect("rows");
}

async fn rows(servers: &Servers, config: &Config) -> u64 {
    let count = servers.postgres.sql_in(&config.namespace, "SELECT count(*) FROM message").await;
    count.expect("a count").parse().expect("a number")
}

fn message(n: u8) -> NewMessage {
    let key = IdentityKey::new([n; 32]);
    NewMessage {
        sender: key,
        recipient: key,
        channel: ChannelId::DEFAULT,
        payload: "hello".into(),
        payload_sha256: [7; 32],
        message_id: Some(MessageId::new([1; 16])),
        now: NOW,
        ttl: HOUR,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enqueue_removes_at_most_300_of_many_expired_messages() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let store = edge(&config).await;
    let stores = store.stores();
    fill(&servers, &config, &stores, INBOXES).await;
    let before = rows(&servers, &config).await;
    let outcomes = stores.inboxes.enqueue(Batch::new((0..INBOXES).map(message).collect())).await;
    for outcome in outcomes.expect("enqueue") {
        assert!(matches!(outcome, Enqueued::Accepted(receipt) if receipt.seq.0 == EXPIRED + 1));
    }
    let removed = before + u64::from(INBOXES) - rows(&servers, &config).await;
    assert!((1..=300).contains(&removed), "{removed} rows in one transaction");
    let limit = PageLimit { messages: 10, bytes: 1 << 20 };
    let inbox = IdentityKey::new([0; 32]);
    let read = ReadQuery { reader: Reader::single(inbox), view: View::All };
    let page = stores.inboxes.peek(read, qpq_domain::Seq::ZERO, limit, NOW).await.expect("peek");
    assert_eq!(page.envelopes.len(), 1, "the others have expired");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_empties_many_full_inboxes() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let store = edge(&config).await;
    let stores = store.stores();
    fill(&servers, &config, &stores, INBOXES).await;
    let mut left = u64::from(INBOXES) * EXPIRED;
    while left > 0 {
        let swept = stores.maintenance.sweep(NOW).await.expect("a sweep").rows;
        assert!((1..=256).contains(&swept), "{swept} rows in one transaction, {left} left");
        left -= swept;
    }
    let heads =
        "SELECT count(*) FROM inbox WHERE messages <> 0 OR bytes <> 0 OR next_expiry < 9e18";
    assert_eq!(servers.postgres.sql_in(&config.namespace, heads).await.expect("heads"), "0");
}

/// The removal of each row takes so long that a whole batch never ends in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_that_takes_too_long_continues_with_fewer_rows() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let config = Config { postgres_timeout: Duration::from_millis(500), ..config };
    let store = edge(&config).await;
    let stores = Arc::new(store.stores());
    fill(&servers, &config, &stores, 1).await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                    'BEGIN PERFORM pg_sleep(0.02); RETURN OLD; END';
                CREATE TRIGGER slow BEFORE DELETE ON message FOR EACH ROW EXECUTE FUNCTION slow()";
    servers.postgres.sql_in(&config.namespace, slow).await.expect("a slow disk");
    let swept = stores.maintenance.sweep(NOW).await.expect("a sweep").rows;
    assert!((1..256).contains(&swept), "{swept} rows");
    let next = stores.maintenance.sweep(NOW).await.expect("another").rows;
    assert!(next > 0);
    assert_eq!(rows(&servers, &config).await, EXPIRED - swept - next);
}
