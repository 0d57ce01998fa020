//! A UDP relay between one client and a server. The relay records all datagrams, can drop those of
//! either direction, and can switch to another server.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{net::UdpSocket, sync::mpsc};

use crate::support::within;

pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    sockets: Arc<Sockets>,
    up: mpsc::UnboundedReceiver<Vec<u8>>,
    down: mpsc::UnboundedReceiver<Vec<u8>>,
}

/// The sockets and the state of the relay.
struct Sockets {
    client_side: UdpSocket,
    server_side: UdpSocket,
    client: Mutex<Option<SocketAddr>>,
    server: Mutex<SocketAddr>,
    open_up: AtomicBool,
    open_down: AtomicBool,
}

impl Relay {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let sockets = Arc::new(Sockets {
            client_side: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
            server_side: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
            client: Mutex::new(None),
            server: Mutex::new(server),
            open_up: AtomicBool::new(true),
            open_down: AtomicBool::new(true),
        });
        let addr = sockets.client_side.local_addr().unwrap();
        let (ups, up) = mpsc::unbounded_channel();
        let (downs, down) = mpsc::unbounded_channel();
        tokio::spawn(pass(Arc::clone(&sockets), ups, downs));
        Self { addr, sockets, up, down }
    }

    /// Sets whether datagrams of the client are forwarded.
    pub(crate) fn set_up(&self, open: bool) {
        self.sockets.open_up.store(open, Ordering::SeqCst);
    }

    /// Sets whether datagrams of the server are forwarded.
    pub(crate) fn set_down(&self, open: bool) {
        self.sockets.open_down.store(open, Ordering::SeqCst);
    }

    /// Forwards to this server from now on, from the same address as before.
    pub(crate) fn turn_to(&self, server: SocketAddr) {
        *self.sockets.server.lock() = server;
    }

    /// Returns the next datagram of the client, forwarded or dropped.
    pub(crate) async fn next_up(&mut self) -> Vec<u8> {
        within(self.up.recv()).await.unwrap()
    }

    /// Returns the next datagram of the server, forwarded or dropped.
    pub(crate) async fn next_down(&mut self) -> Vec<u8> {
        within(self.down.recv()).await.unwrap()
    }

    /// Discards the recorded datagrams of the server.
    pub(crate) fn forget_down(&mut self) {
        while self.down.try_recv().is_ok() {}
    }

    /// Discards the recorded datagrams of the client.
    pub(crate) fn forget_up(&mut self) {
        while self.up.try_recv().is_ok() {}
    }

    /// Sends a datagram to the server, from the address of the forwarded ones.
    pub(crate) async fn send_up(&self, datagram: &[u8]) {
        let server = *self.sockets.server.lock();
        self.sockets.server_side.send_to(datagram, server).await.unwrap();
    }

    /// Sends a datagram to the client, as if the server had sent it.
    pub(crate) async fn send_down(&self, datagram: &[u8]) {
        let client = self.sockets.client.lock().expect("the client has sent something");
        self.sockets.client_side.send_to(datagram, client).await.unwrap();
    }
}

async fn pass(
    sockets: Arc<Sockets>,
    ups: mpsc::UnboundedSender<Vec<u8>>,
    downs: mpsc::UnboundedSender<Vec<u8>>,
) {
    let (mut up_buffer, mut down_buffer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            Ok((len, from)) = sockets.client_side.recv_from(&mut up_buffer) => {
                *sockets.client.lock() = Some(from);
                let datagram = &up_buffer[..len];
                let server = *sockets.server.lock();
                if sockets.open_up.load(Ordering::SeqCst) {
                    let _ = sockets.server_side.send_to(datagram, server).await;
                }
                if ups.send(datagram.to_vec()).is_err() {
                    return;
                }
            }
            Ok((len, _)) = sockets.server_side.recv_from(&mut down_buffer) => {
                let datagram = &down_buffer[..len];
                if downs.send(datagram.to_vec()).is_err() {
                    return;
                }
                let client = *sockets.client.lock();
                if let (true, Some(client)) = (sockets.open_down.load(Ordering::SeqCst), client) {
                    let _ = sockets.client_side.send_to(datagram, client).await;
                }
            }
        }
    }
}
