//! The limits of connections and handshakes, and the notification of a refused client.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use qpq_transport::{
    Alpn, Config,
    client::{ConnectError, Connection},
};
use tokio::net::UdpSocket;

use crate::{
    relay::Relay,
    support::{Harness, Report, config, method, within},
};

async fn try_connect(harness: &Harness) -> Result<Connection, ConnectError> {
    within(harness.dialer().connect(harness.addr(), "localhost")).await
}

/// Retries until a permit is free: the server frees that of a closed connection shortly after it
/// has notified the client.
async fn connect_when_permitted(harness: &Harness) -> Connection {
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
async fn a_connection_above_the_limit_is_refused_with_an_answer() {
    let mut config = config();
    config.limits.max_connections = 1;
    let harness = Harness::with(config);
    let first = harness.connect().await;
    let refused = try_connect(&harness).await;
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
    within(first.close()).await;
    connect_when_permitted(&harness).await;
}

#[tokio::test]
async fn a_connection_above_the_limit_of_its_address_is_refused() {
    let mut config = config();
    config.limits.max_connections_per_ip = 2;
    let harness = Harness::with(config);
    let _open = [harness.connect().await, harness.connect().await];
    let refused = try_connect(&harness).await;
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
}

#[tokio::test]
async fn under_pressure_clients_prove_their_address_and_connect() {
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
async fn a_handshake_that_times_out_frees_its_permits() {
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
    // The server has answered the first packet and waits for the client.
    relay.next_down().await;
    let refused = try_connect(&harness).await;
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
    connect_when_permitted(&harness).await;
    abandoned.abort();
}

#[tokio::test]
async fn the_service_is_notified_of_address_and_protocol() {
    let mut harness = Harness::start();
    for alpn in Alpn::CLIENTS {
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
async fn every_connection_has_its_own_port() {
    let mut harness = Harness::start();
    let dialer = harness.dialer();
    let mut ports = std::collections::HashSet::new();
    for _ in 0..5 {
        let connection = within(dialer.connect(harness.addr(), "localhost")).await.unwrap();
        let Report::Connected(peer) = harness.next_report().await else { panic!() };
        ports.insert(peer.addr.port());
        // Kept open: the port of a closed connection could be used again.
        std::mem::forget(connection);
    }
    assert_eq!(ports.len(), 5);
}

#[tokio::test]
async fn the_unspecified_address_of_ipv6_serves_ipv4_too() {
    let any = Config::new((Ipv6Addr::UNSPECIFIED, 0).into());
    let harness = Harness::with(any);
    let [v6, v4] = harness.server.local_addrs() else { panic!("{:?}", harness.server) };
    assert_eq!(v6.port(), v4.port());
    for ip in [IpAddr::from(Ipv6Addr::LOCALHOST), Ipv4Addr::LOCALHOST.into()] {
        let dialer = harness.dialer();
        let echo = within(dialer.connect((ip, v6.port()).into(), "localhost")).await.unwrap();
        let call = echo.call(method::ECHO, "in".into(), 1, Duration::from_secs(60));
        assert_eq!(within(call).await.unwrap().1, "in", "{ip}");
    }
}

#[tokio::test]
async fn a_server_listens_on_several_addresses_under_one_set_of_limits() {
    let mut config = config();
    config.listen.push((Ipv4Addr::new(127, 0, 0, 2), 0).into());
    config.limits.max_connections = 2;
    let harness = Harness::with(config);
    let addrs = harness.server.local_addrs().to_vec();
    let mut open = Vec::new();
    for addr in &addrs {
        open.push(within(harness.dialer().connect(*addr, "localhost")).await.unwrap());
    }
    for addr in addrs {
        let refused = within(harness.dialer().connect(addr, "localhost")).await;
        assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
    }
}

#[tokio::test]
async fn junk_datagrams_from_many_addresses_do_not_stop_other_clients() {
    let harness = Harness::start();
    let before = harness.connect().await;
    // A byte, a short header, a long header without a version, a malformed Initial.
    let junk = [
        vec![0],
        vec![0x40; 40],
        vec![0xc0; 1_200],
        [&[0xc3, 0, 0, 0, 1][..], &[9; 1_195]].concat(),
    ];
    for sender in 0..200_u8 {
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 1, sender), 0)).await.unwrap();
        for n in 0..100 {
            socket.send_to(&junk[n % junk.len()][..], harness.addr()).await.unwrap();
        }
    }
    let after = harness.connect().await;
    for connection in [before, after] {
        let call = connection.call(method::ECHO, "in".into(), 1, Duration::from_secs(60));
        assert_eq!(within(call).await.unwrap().1, "in");
    }
}
