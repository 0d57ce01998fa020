//! Notifications for a service manager, at a socket that stands for systemd.

use nix::sys::signal::Signal;
use tokio::{net::UnixDatagram, time::timeout};

use crate::harness::{Data, HANGS, ServerProcess};

/// The socket of a service manager.
struct Manager(UnixDatagram);

impl Manager {
    /// Returns the next notification other than those of the watchdog.
    async fn state(&self) -> String {
        loop {
            let state = self.next().await;
            if state != "WATCHDOG=1\n" {
                return state;
            }
        }
    }

    async fn next(&self) -> String {
        let mut buffer = [0; 256];
        let length = timeout(HANGS, self.0.recv(&mut buffer)).await.expect("a state").unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }
}

#[tokio::test]
async fn the_service_manager_receives_the_states_of_a_server_and_its_signs_of_life() {
    let data = Data::new();
    let socket = data.file("notify");
    let manager = Manager(UnixDatagram::bind(&socket).unwrap());
    let (dir, socket) = (data.file("data"), socket.to_str().unwrap().to_owned());
    let variables = [("NOTIFY_SOCKET", &*socket), ("WATCHDOG_USEC", "200000")];
    let server = ServerProcess::start(dir.to_str().unwrap(), &variables).await;
    assert_eq!(manager.next().await, "READY=1\n");
    for _ in 0..3 {
        assert_eq!(manager.next().await, "WATCHDOG=1\n");
    }
    server.signal(Signal::SIGHUP);
    let reloading = manager.state().await;
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(manager.state().await, "READY=1\n");
    server.signal(Signal::SIGTERM);
    assert_eq!(manager.state().await, "STOPPING=1\n");
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("service manager not notified"), "{log}");
}

#[tokio::test]
async fn a_service_manager_that_does_not_listen_stops_no_server() {
    let data = Data::new();
    let absent = data.file("absent");
    let dir = data.file("data");
    let variables = [("NOTIFY_SOCKET", absent.to_str().unwrap())];
    let server = ServerProcess::start(dir.to_str().unwrap(), &variables).await;
    assert_eq!(server.health().await.status, "ok");
    server.signal(Signal::SIGTERM);
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("service manager not notified"), "{log}");
}
