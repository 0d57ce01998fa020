//! Redis as a cluster and with a Sentinel: complete after the start and after the loss of nodes.

use qpq_test_services::{RedisCluster, RedisSentinel, resp::Reply};

/// Checks at compile time that a future is `Send`, as multi-threaded tests need.
fn is_send<T: Send>(future: T) -> T {
    future
}

#[tokio::test]
async fn a_cluster_serves_all_slots_again_after_a_node_returns() {
    let cluster = is_send(RedisCluster::start(3)).await.unwrap();
    assert_eq!(cluster.urls().len(), 3);
    let slots = cluster.nodes()[2].command(["CLUSTER", "SLOTS"]).await.unwrap();
    let mut ports: Vec<_> = slots
        .array()
        .unwrap()
        .iter()
        .map(|slot| slot.array().unwrap()[2].array().unwrap()[1].integer().unwrap())
        .collect();
    ports.sort_unstable();
    let mut expected: Vec<_> = cluster.nodes().iter().map(|n| i64::from(n.port())).collect();
    expected.sort_unstable();
    assert_eq!(ports, expected, "each serves a part");

    let mut served = 0;
    for node in cluster.nodes() {
        match node.command(["SET", "{a}", "1"]).await {
            Ok(_) => served += 1,
            Err(moved) => assert!(moved.to_string().contains("MOVED 15495 127.0.0.1:"), "{moved}"),
        }
    }
    assert_eq!(served, 1, "a slot has one owner");

    let lost = &cluster.nodes()[2];
    lost.kill9().await.unwrap();
    lost.start_again().await.unwrap();
    cluster.wait_until_complete().await.unwrap();
    cluster.flush_all().await.unwrap();
    for node in cluster.nodes() {
        assert_eq!(node.command(["DBSIZE"]).await.unwrap(), Reply::Integer(0));
    }
}

#[tokio::test]
async fn a_sentinel_fails_over_on_request_and_after_a_loss() {
    let redis = is_send(RedisSentinel::start()).await.unwrap();
    let first = redis.primary().await.unwrap().port();
    let second = redis.replica().await.unwrap().port();
    redis.primary().await.unwrap().command(["SET", "a", "1"]).await.unwrap();
    let refused = redis.replica().await.unwrap().command(["SET", "a", "2"]).await.unwrap_err();
    assert!(refused.to_string().contains("READONLY"), "{refused}");
    // Waits for the replica, because a requested failover does not.
    let waited = redis.primary().await.unwrap().command(["WAIT", "1", "0"]).await.unwrap();
    assert_eq!(waited, Reply::Integer(1));

    is_send(redis.fail_over()).await.unwrap();
    let primary = redis.primary().await.unwrap();
    assert_eq!(primary.port(), second);
    assert_eq!(primary.command(["GET", "a"]).await.unwrap(), Reply::Bulk(b"1".to_vec()));
    primary.command(["SET", "a", "3"]).await.unwrap();

    is_send(redis.fail_over()).await.unwrap();
    assert_eq!(redis.primary().await.unwrap().port(), first);

    is_send(redis.lose_primary()).await.unwrap();
    assert_eq!(redis.primary().await.unwrap().port(), second);
    redis.primary().await.unwrap().command(["SET", "a", "4"]).await.unwrap();
    redis.replica().await.unwrap().start_again().await.unwrap();
    is_send(redis.fail_over()).await.unwrap();
    assert_eq!(redis.primary().await.unwrap().port(), first, "the one that was lost follows again");
}
