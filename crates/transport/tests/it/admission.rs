//! Who is let in, and how the others learn that they are not.

use std::time::Duration;

use qpq_transport::{
    Alpn,
    client::{ConnectError, Connection},
};

use crate::{
    relay::Relay,
    support::{Harness, Report, config, method, within},
};

async fn try_connect(harness: &Harness) -> Result<Connection, ConnectError> {
    within(harness.dialer().connect(harness.addr(), "localhost")).await
}

/// Until a place is free: the server counts a connection out shortly after it says so.
async fn connect_at_last(harness: &Harness) -> Connection {
    within(async {
        loop {
            match try_connect(harness).await {
                Ok(connection) => return connection,
                Err(error) => assert!(matches!(error, ConnectError::Refused), "{error}"),
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_connection_above_the_cap_is_refused_and_not_ignored() {
    let mut config = config();
    config.limits.max_connections = 1;
    let harness = Harness::with(config);
    let first = harness.connect().await;
    let refused = try_connect(&harness).await;
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
    within(first.close()).await;
    connect_at_last(&harness).await;
}

#[tokio::test]
async fn a_connection_above_its_addresss_cap_is_refused() {
    let mut config = config();
    config.limits.max_connections_per_ip = 2;
    let harness = Harness::with(config);
    let _inside = [harness.connect().await, harness.connect().await];
    let refused = try_connect(&harness).await;
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
}

#[tokio::test]
async fn under_pressure_clients_prove_their_address_and_get_in() {
    for (retry_above, expected) in [(0, true), (100, false)] {
        let mut config = config();
        config.limits.retry_above = retry_above;
        let harness = Harness::with(config);
        let mut relay = Relay::to(harness.addr()).await;
        let connecting =
            async { within(harness.dialer().connect(relay.addr, "localhost")).await.unwrap() };
        let connection = connecting.await;
        let call = connection.call(method::ECHO, "in".into(), 1, Duration::from_secs(60));
        assert_eq!(within(call).await.unwrap().1, "in");
        // RFC 9000 §17.2.5: long header, version 1, packet type 3.
        let first = relay.next_down().await;
        let is_retry = first[0] & 0xf0 == 0xf0 && first[1..5] == [0, 0, 0, 1];
        assert_eq!(is_retry, expected);
    }
}

#[tokio::test]
async fn a_handshake_that_goes_nowhere_gives_its_place_back() {
    let mut config = config();
    config.limits.max_connections = 1;
    config.timeouts.handshake = Duration::from_millis(500);
    let harness = Harness::with(config);
    let mut relay = Relay::to(harness.addr()).await;
    relay.set_down(false);
    let dialer = harness.dialer().with_connect_timeout(Duration::from_secs(60));
    let abandoned = {
        let addr = relay.addr;
        tokio::spawn(async move { dialer.connect(addr, "localhost").await })
    };
    // The server has answered the first packet, and waits.
    relay.next_down().await;
    let refused = try_connect(&harness).await;
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
    connect_at_last(&harness).await;
    abandoned.abort();
}

#[tokio::test]
async fn the_service_learns_who_connected_from_where() {
    let mut harness = Harness::start();
    for alpn in Alpn::ALL {
        let dialer = harness.dialer().with_alpn(alpn.name().to_vec());
        let connection = within(dialer.connect(harness.addr(), "localhost")).await.unwrap();
        let Report::Connected(peer) = harness.next_report().await else { panic!() };
        assert_eq!(peer.alpn, alpn);
        assert!(peer.addr.ip().is_loopback());
        within(connection.close()).await;
        assert_eq!(harness.next_report().await, Report::Disconnected);
    }
}

#[tokio::test]
async fn every_connection_has_a_port_of_its_own() {
    let mut harness = Harness::start();
    let dialer = harness.dialer();
    let mut ports = std::collections::HashSet::new();
    for _ in 0..5 {
        let connection = within(dialer.connect(harness.addr(), "localhost")).await.unwrap();
        let Report::Connected(peer) = harness.next_report().await else { panic!() };
        ports.insert(peer.addr.port());
        // Kept open: closed, its port could come again.
        std::mem::forget(connection);
    }
    assert_eq!(ports.len(), 5);
}
