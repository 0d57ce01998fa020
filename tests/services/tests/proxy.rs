//! Tests of the proxies with real sockets: data is forwarded, and each fault has its effect.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU64,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use qpq_test_services::proxy::{Faults, Link, Switch, TcpProxy, UdpProxy, Way};
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// The time limit for data that must arrive.
const PATIENCE: Duration = Duration::from_secs(60);
/// The time for which a test checks that data does not arrive.
const GLANCE: Duration = Duration::from_millis(100);

fn seed(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Starts a listener and a proxy to it.
async fn tcp() -> (TcpListener, TcpProxy) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let proxy =
        TcpProxy::start(listener.local_addr().expect("an address"), seed(1)).await.expect("a port");
    (listener, proxy)
}

/// Returns both ends of a connection through the proxy.
async fn pair(listener: &TcpListener, proxy: &TcpProxy) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(proxy.addr()).await.expect("the proxy listens");
    let (server, _) =
        timeout(PATIENCE, listener.accept()).await.expect("it comes").expect("a connection");
    (client, server)
}

async fn read(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    timeout(PATIENCE, stream.read_exact(&mut bytes))
        .await
        .expect("it comes")
        .expect("the connection stands");
    bytes
}

async fn assert_reset(stream: &mut TcpStream) {
    let ended = timeout(PATIENCE, stream.read(&mut [0; 16])).await.expect("it ends");
    assert_eq!(ended.expect_err("it is reset").kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn tcp_data_is_forwarded_and_each_direction_ends_separately() {
    let (listener, proxy) = tcp().await;
    proxy.switch().set(Faults { jitter: Duration::from_millis(3), ..Faults::default() });
    let mut data = vec![0; 1 << 20];
    seed(2).fill_bytes(&mut data);
    let mut connections = Vec::new();
    for _ in 0..4 {
        connections.push(pair(&listener, &proxy).await);
    }
    for (mut client, mut server) in connections {
        let data = data.clone();
        let sent = data.clone();
        let sender = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut back = Vec::new();
            client.read_to_end(&mut back).await.unwrap();
            back
        });
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert!(got == data, "all of it, as it was");
        server.write_all(b"that way it is open yet").await.unwrap();
        drop(server);
        assert_eq!(sender.await.unwrap(), b"that way it is open yet");
    }
    let tally = proxy.switch().tally();
    assert_eq!((tally.begun, tally.cut), (4, 0));
}

#[tokio::test]
async fn tcp_data_is_delayed_by_latency_and_throttle() {
    let (listener, proxy) = tcp().await;
    let (mut client, mut server) = pair(&listener, &proxy).await;
    let latency = Duration::from_millis(80);
    proxy.switch().set(Faults { latency, ..Faults::default() });
    let begun = Instant::now();
    client.write_all(b"there").await.unwrap();
    read(&mut server, 5).await;
    assert!(begun.elapsed() >= latency);
    server.write_all(b"back").await.unwrap();
    read(&mut client, 4).await;
    assert!(begun.elapsed() >= 2 * latency);

    proxy.switch().set(Faults { throttle: NonZeroU64::new(50_000), ..Faults::default() });
    let begun = Instant::now();
    client.write_all(&[1; 10_000]).await.unwrap();
    read(&mut server, 10_000).await;
    assert!(begun.elapsed() >= Duration::from_millis(200), "10 kB at 50 kB/s");
}

#[tokio::test]
async fn tcp_data_waits_during_a_partition() {
    let (listener, proxy) = tcp().await;
    let (mut client, mut server) = pair(&listener, &proxy).await;
    proxy.switch().change(|f| f.link = Link::Blackhole(Way::ToClient));
    client.write_all(b"a").await.unwrap();
    assert_eq!(read(&mut server, 1).await, b"a", "the other way is open");
    server.write_all(b"b").await.unwrap();
    assert!(timeout(GLANCE, client.peek(&mut [0])).await.is_err());
    proxy.switch().change(|f| f.link = Link::Blackhole(Way::Both));
    client.write_all(b"c").await.unwrap();
    let mut late = TcpStream::connect(proxy.addr()).await.unwrap();
    late.write_all(b"d").await.unwrap();
    assert!(timeout(GLANCE, server.peek(&mut [0])).await.is_err());
    assert!(timeout(GLANCE, listener.accept()).await.is_err());

    proxy.switch().heal();
    assert_eq!(read(&mut client, 1).await, b"b");
    assert_eq!(read(&mut server, 1).await, b"c");
    let (mut late_server, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    assert_eq!(read(&mut late_server, 1).await, b"d");
}

#[tokio::test]
async fn a_cut_resets_tcp_connections_at_both_ends() {
    let (listener, proxy) = tcp().await;
    let mut pairs = Vec::new();
    for _ in 0..3 {
        pairs.push(pair(&listener, &proxy).await);
    }
    proxy.switch().cut_all();
    for (client, server) in &mut pairs {
        assert_reset(client).await;
        assert_reset(server).await;
    }
    let (mut client, mut server) = pair(&listener, &proxy).await;
    client.write_all(b"new").await.unwrap();
    assert_eq!(read(&mut server, 3).await, b"new");

    proxy.switch().change(|f| f.link = Link::Reset);
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    assert_reset(&mut TcpStream::connect(proxy.addr()).await.unwrap()).await;
    proxy.switch().heal();
    pair(&listener, &proxy).await;
    assert_eq!(proxy.switch().tally().begun, 6);
    until("five to be counted", || proxy.switch().tally().cut == 5).await;
}

#[tokio::test]
async fn tcp_to_a_stopped_target_or_a_dropped_proxy_fails() {
    let (listener, proxy) = tcp().await;
    let (mut client, mut server) = pair(&listener, &proxy).await;
    let target = listener.local_addr().unwrap();
    drop(listener);
    assert_reset(&mut TcpStream::connect(proxy.addr()).await.unwrap()).await;
    let listener = TcpListener::bind(target).await.unwrap();
    pair(&listener, &proxy).await;

    let addr = proxy.addr();
    drop(proxy);
    for stream in [&mut client, &mut server] {
        let ended = timeout(PATIENCE, stream.read(&mut [0; 1])).await.unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)), "it has ended: {ended:?}");
    }
    assert!(TcpStream::connect(addr).await.is_err());
}

/// The datagrams that a target received: their addresses, and the numbers in order.
#[derive(Default)]
struct Received {
    from: Vec<SocketAddr>,
    numbers: Vec<u32>,
}

/// Starts a target that records datagrams and sends them back, and a proxy to it.
async fn udp(random: StdRng) -> (Arc<Mutex<Received>>, UdpProxy, JoinHandle<()>) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let proxy =
        UdpProxy::start(socket.local_addr().expect("an address"), random).await.expect("a port");
    let got = Arc::new(Mutex::new(Received::default()));
    let keep = Arc::clone(&got);
    let task = tokio::spawn(async move {
        let mut buffer = [0; 4];
        while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
            {
                let mut got = keep.lock();
                got.from.push(from);
                got.numbers.push(u32::from_be_bytes(buffer));
            }
            socket.send_to(&buffer, from).await.expect("loopback");
        }
    });
    (got, proxy, task)
}

async fn client_of(proxy: &UdpProxy) -> UdpSocket {
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    client.connect(proxy.addr()).await.expect("loopback");
    client
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    timeout(PATIENCE, async {
        while !is_so() {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("waited for {what}"));
}

/// Sends numbers in one direction, no faster than the proxy receives them, so that no kernel buffer
/// overflows.
async fn send_numbers(client: &UdpSocket, switch: &Switch, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let decided = |t: qpq_test_services::proxy::Tally| t.passed + t.lost - t.doubled;
        let before = decided(switch.tally());
        client.send(&number.to_be_bytes()).await.expect("loopback");
        until("the proxy to decide", || decided(switch.tally()) > before).await;
    }
}

#[tokio::test]
async fn udp_datagrams_are_forwarded_in_both_directions_for_each_client() {
    let (got, proxy, _target) = udp(seed(1)).await;
    let clients = [client_of(&proxy).await, client_of(&proxy).await];
    for number in 0..100_u32 {
        for client in &clients {
            client.send(&number.to_be_bytes()).await.unwrap();
            let mut buffer = [0; 8];
            let length = timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(buffer[..length], number.to_be_bytes());
        }
    }
    let tally = proxy.switch().tally();
    assert_eq!((tally.begun, tally.passed, tally.lost), (2, 400, 0));
    let got = got.lock();
    assert_eq!(got.numbers.len(), 200);
    assert_ne!(got.from[0], got.from[1], "each has a port of its own");
}

/// Returns the number of times that each of 400 datagrams reached the target. The way back is
/// blocked, so that only one direction uses random numbers.
async fn fates(random: StdRng) -> BTreeMap<u32, usize> {
    let (got, proxy, _target) = udp(random).await;
    let client = client_of(&proxy).await;
    let blocked_back = Link::Blackhole(Way::ToClient);
    proxy.switch().set(Faults {
        link: blocked_back,
        loss: 0.3,
        duplication: 0.2,
        ..Faults::default()
    });
    for number in 0..400_u32 {
        client.send(&number.to_be_bytes()).await.expect("loopback");
        // Each copy that arrives is lost on its way back.
        let all_decided = || {
            let tally = proxy.switch().tally();
            let arrived = got.lock().numbers.len() as u64;
            tally.passed == arrived
                && tally.passed + tally.lost == u64::from(number) + 1 + tally.doubled + arrived
        };
        until("the proxy to decide", all_decided).await;
    }
    let mut fates: BTreeMap<u32, usize> = (0..400).map(|number| (number, 0)).collect();
    for number in &got.lock().numbers {
        *fates.get_mut(number).expect("one that was sent") += 1;
    }
    fates
}

#[tokio::test]
async fn the_same_seed_loses_and_duplicates_the_same_datagrams() {
    let first = fates(seed(5)).await;
    let count = |times: usize| first.values().filter(|&&t| t == times).count();
    assert!((80..160).contains(&count(0)), "{} of 400 lost", count(0));
    assert!((30..90).contains(&count(2)), "{} of 280 doubled", count(2));
    assert_eq!(count(0) + count(1) + count(2), 400);
    assert_eq!(first, fates(seed(5)).await, "the same seed, the same fates");
    assert_ne!(first, fates(seed(6)).await);
}

#[tokio::test]
async fn later_datagrams_overtake_a_reordered_one() {
    let (got, proxy, _target) = udp(seed(1)).await;
    let client = client_of(&proxy).await;
    proxy.switch().set(Faults {
        reordering: 0.2,
        held_back: Duration::from_millis(30),
        ..Faults::default()
    });
    for number in 0..200_u32 {
        client.send(&number.to_be_bytes()).await.unwrap();
        tokio::task::yield_now().await;
        if number % 50 == 49 {
            until("they arrive", || got.lock().numbers.len() == number as usize + 1).await;
        }
    }
    let tally = proxy.switch().tally();
    assert!(tally.held_back > 0 && tally.lost == 0, "{tally:?}");
    let mut numbers = got.lock().numbers.clone();
    assert!(!numbers.is_sorted(), "some came late");
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..200), "all came, once");
}

#[tokio::test]
async fn a_cut_forgets_udp_flows_and_a_partition_loses_datagrams() {
    let (got, proxy, _target) = udp(seed(1)).await;
    let client = client_of(&proxy).await;
    let mut buffer = [0; 4];
    let mut echo = async |number: u32| {
        client.send(&number.to_be_bytes()).await.unwrap();
        timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(buffer, number.to_be_bytes());
    };
    echo(1).await;
    echo(2).await;
    proxy.switch().cut_all();
    until("the flow to be forgotten", || proxy.switch().tally().cut == 1).await;
    echo(3).await;
    {
        let from = &got.lock().from;
        assert_eq!(from[0], from[1]);
        assert_ne!(from[1], from[2], "the target sees another port");
    }

    proxy.switch().change(|f| f.link = Link::Blackhole(Way::ToTarget));
    send_numbers(&client, proxy.switch(), 10..20).await;
    proxy.switch().change(|f| f.link = Link::Reset);
    send_numbers(&client, proxy.switch(), 20..30).await;
    proxy.switch().heal();
    echo(4).await;
    let tally = proxy.switch().tally();
    assert_eq!((tally.lost, tally.cut, tally.begun), (20, 2, 3));
    assert_eq!(got.lock().numbers, [1, 2, 3, 4], "nothing of the partition came later");
}

#[tokio::test]
async fn udp_datagrams_are_delayed_and_a_stopped_target_does_not_end_the_flow() {
    let (_, proxy, target) = udp(seed(1)).await;
    let client = client_of(&proxy).await;
    let latency = Duration::from_millis(50);
    proxy.switch().set(Faults { latency, ..Faults::default() });
    let begun = Instant::now();
    client.send(&[0; 4]).await.unwrap();
    timeout(PATIENCE, client.recv(&mut [0; 4])).await.unwrap().unwrap();
    assert!(begun.elapsed() >= 2 * latency);

    proxy.switch().heal();
    target.abort();
    let _ended = target.await;
    for _ in 0..5 {
        client.send(&[0; 4]).await.expect("the proxy is there");
        assert!(timeout(GLANCE, client.recv(&mut [0; 4])).await.is_err());
    }
}
