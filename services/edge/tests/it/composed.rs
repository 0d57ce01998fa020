//! Servers in the process of the test, as the tests of other crates use them.

use std::{
    future::{pending, ready},
    net::SocketAddr,
};

use qpq_runtime::config::ListenOn;
use qpq_server::{Config, Running, StartError, compose};
use qpq_transport::client::{ConnectError, Dialer, Trust};

use crate::harness::{Data, connect, health, page};

fn config(data: &Data) -> Config {
    let anywhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let mut config =
        Config { listen: anywhere.into(), data_dir: data.path().into(), ..Config::default() };
    config.http.listen = ListenOn::At(anywhere);
    config
}

async fn health_of(running: &Running) -> String {
    health(&connect(running.local_addr(), running.fingerprint()).await).await.status
}

#[tokio::test]
async fn several_servers_run_in_one_process() {
    let (one, other) = (Data::new(), Data::new());
    let one = compose(&config(&one)).await.unwrap();
    let other = compose(&config(&other)).await.unwrap();
    assert_ne!(one.fingerprint(), other.fingerprint());
    one.shutdown(pending()).await;
    assert_eq!(health_of(&other).await, "ok");
    let (status, _) = page(other.http_addr().unwrap(), "/livez").await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    other.shutdown(pending()).await;
}

#[tokio::test]
async fn a_server_with_http_turned_off_still_answers_health_calls() {
    let data = Data::new();
    let mut config = config(&data);
    config.http.listen = ListenOn::Off;
    let running = compose(&config).await.unwrap();
    assert_eq!(running.http_addr(), None);
    assert_eq!(health_of(&running).await, "ok");
    running.shutdown(pending()).await;
}

#[tokio::test]
async fn a_directory_is_free_again_after_a_shutdown_and_after_a_failed_start() {
    let data = Data::new();
    let config = config(&data);
    let first = compose(&config).await.unwrap();
    let mut taken = config.clone();
    taken.listen = first.local_addr().into();
    assert!(matches!(compose(&taken).await, Err(StartError::Store(_))), "in use");
    let address = first.local_addr();
    first.shutdown(pending()).await;

    let socket = std::net::UdpSocket::bind(address).expect("the port is free again");
    assert!(matches!(compose(&taken).await, Err(StartError::Taken(_))));
    drop(socket);
    compose(&taken).await.unwrap().shutdown(pending()).await;
}

#[tokio::test]
async fn a_hurried_shutdown_closes_the_connections() {
    let data = Data::new();
    let running = compose(&config(&data)).await.unwrap();
    let address = running.local_addr();
    let connection = connect(address, running.fingerprint()).await;
    health(&connection).await;
    running.shutdown(ready(())).await;
    assert_eq!(
        connection.closed().await.to_string(),
        "the server closed the connection: server shutting down (code 0)"
    );
}

#[tokio::test]
async fn a_pin_of_another_certificate_is_refused() {
    let data = Data::new();
    let running = compose(&config(&data)).await.unwrap();
    let dialer = Dialer::new(Trust::Pin([7; 32].into())).unwrap();
    let refused = dialer.connect(running.local_addr(), "localhost").await;
    assert!(matches!(
        refused,
        Err(ConnectError::PinMismatch { seen, .. }) if seen == running.fingerprint()
    ));
}
