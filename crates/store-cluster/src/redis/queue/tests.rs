//! The scripts, on a real Redis.

use qpq_test_services::Redis as Server;

use super::*;
use qpq_domain::StoreLimits;

use crate::config::{Config, Endpoint, Migrate, Timing};

const READER: ReaderId = ReaderId::single(IdentityKey::new([1; 32]));
const NOW: UnixMillis = UnixMillis(1);
const STORE: StoreId = StoreId::new([2; 16]);

async fn redis() -> (Server, Redis) {
    let server = Server::start().await.unwrap();
    let nowhere = || Endpoint { url: String::new(), password: None, ca: None };
    let config = Config {
        postgres: nowhere(),
        redis: Endpoint { url: server.url(), ..nowhere() },
        nats: nowhere(),
        postgres_connections: 0,
        postgres_timeout: Duration::ZERO,
        redis_timeout: Duration::from_secs(60),
        start_timeout: Duration::from_secs(60),
        namespace: "test".to_owned(),
        migrate: Migrate::Never,
        opaque_setup: [0; 32],
        limits: StoreLimits::default(),
        timing: Timing::default(),
        clocks: crate::Clocks::default(),
        blobs: crate::BlobPlaces::default(),
    };
    let redis = Redis::connect(&config).await.unwrap();
    (server, redis)
}

impl Redis {
    async fn found(&self, head: u64, removals: u64) -> QueueAnswer {
        let limit = PageLimit { messages: 10, bytes: 1 << 20 };
        let state = State { store_id: STORE, head, removals };
        let query = QueueRead {
            reader: &READER,
            view: View::All,
            state,
            accept: Freshness::AtLeast,
            after: Seq::ZERO,
            limit,
            now: NOW,
            term: None,
            edge: None,
        };
        self.read(query).await.unwrap()
    }

    /// Returns the seqs that a reader of that state gets.
    async fn shown(&self, head: u64, removals: u64) -> Vec<u64> {
        match self.found(head, removals).await {
            QueueAnswer::Page(shown) => {
                shown.page.envelopes.iter().map(|envelope| envelope.seq.0).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    async fn permit(&self, head: u64, removals: u64) -> Permit {
        match self.found(head, removals).await {
            QueueAnswer::NotLoaded(permit) => permit,
            other => panic!("{other:?}"),
        }
    }

    async fn load_seqs(&self, permit: Permit, head: u64, removals: u64, seqs: &[u64]) {
        let messages: Vec<_> = seqs.iter().map(|seq| queued(*seq)).collect();
        self.load(&READER, permit, State { store_id: STORE, head, removals }, &messages)
            .await
            .unwrap();
    }
}

/// The removal of message 1.
fn removal(number: u64) -> Removal {
    Removal {
        reader: READER,
        view: View::All,
        store_id: STORE,
        number,
        lease: None,
        seqs: vec![Seq(1)],
    }
}

fn queued(seq: u64) -> Queued {
    let payload = Bytes::from_static(b"hello");
    let envelope = Envelope {
        seq: Seq(seq),
        channel: ChannelId::DEFAULT,
        payload,
        enqueued_at: UnixMillis(0),
    };
    Queued { envelope, expires_at: UnixMillis(2) }
}

/// One reader has read message 1 in Postgres, and loads it only after another reader has removed
/// it. A third reader has read the inbox's state before the removal.
#[tokio::test]
async fn a_slow_load_restores_no_removed_message() {
    let (_server, redis) = redis().await;
    let permit = redis.permit(1, 0).await;
    redis.load_seqs(permit, 1, 0, &[1]).await;
    assert_eq!(redis.shown(1, 0).await, [1]);

    // Message 2 is committed and not pushed yet, so a reader must load the queue.
    let slow = redis.permit(2, 0).await;
    redis.removed(&removal(1)).await.unwrap();
    redis.load_seqs(slow, 2, 0, &[1, 2]).await;
    assert_eq!(redis.shown(1, 0).await, [0; 0], "it has been removed");

    let permit = redis.permit(2, 0).await;
    redis.load_seqs(permit, 2, 1, &[2]).await;
    assert_eq!(redis.shown(2, 1).await, [2]);
}

#[tokio::test]
async fn an_unnumbered_removal_drops_the_queue() {
    let (_server, redis) = redis().await;
    let permit = redis.permit(2, 0).await;
    redis.load_seqs(permit, 2, 0, &[1, 2]).await;
    let slow = redis.permit(3, 0).await;
    redis.removed(&removal(UNKNOWN_REMOVAL)).await.unwrap();
    redis.load_seqs(slow, 3, 0, &[1, 2, 3]).await;
    let permit = redis.permit(1, 0).await;
    redis.load_seqs(permit, 3, 1, &[2, 3]).await;
    assert_eq!(redis.shown(3, 1).await, [2, 3]);
}

#[tokio::test]
async fn a_slow_load_into_an_empty_queue_restores_no_removed_message() {
    let (server, redis) = redis().await;
    let slow = redis.permit(1, 0).await;
    redis.removed(&removal(1)).await.unwrap();
    redis.load_seqs(slow, 1, 0, &[1]).await;
    let slow = redis.permit(1, 0).await;

    // The same after Redis has lost everything, including the number of removals.
    redis.removed(&removal(1)).await.unwrap();
    server.flush_all().await.unwrap();
    redis.load_seqs(slow, 1, 0, &[1]).await;
    let permit = redis.permit(1, 0).await;

    // Two concurrent loads have the same permit, and the later one changes nothing.
    let same = redis.permit(1, 0).await;
    redis.load_seqs(permit, 1, 1, &[]).await;
    redis.load_seqs(same, 1, 1, &[]).await;
    assert_eq!(redis.shown(1, 1).await, [0; 0]);
}

#[test]
fn a_member_is_decoded_as_it_was_encoded() {
    for (channel, payload) in [(ChannelId::DEFAULT, ""), (ChannelId::new([0xff; 16]), "\0text")] {
        let envelope =
            Envelope { seq: Seq(7), channel, payload: payload.into(), enqueued_at: UnixMillis(5) };
        let queued = Queued { envelope, expires_at: UnixMillis(9) };
        assert_eq!(Queued::decode(&queued.encode()), Some(queued));
    }
}

#[test]
fn truncated_bytes_are_not_decoded_as_a_member() {
    let envelope = Envelope {
        seq: Seq(1),
        channel: ChannelId::new([1; 16]),
        payload: Bytes::new(),
        enqueued_at: UnixMillis(1),
    };
    let whole = Queued { envelope, expires_at: UnixMillis(1) }.encode();
    for length in 0..whole.len() {
        assert_eq!(Queued::decode(&whole[..length]), None, "{length} bytes");
    }
}
