//! A UDP relay between one client and a server that can go deaf in either direction, turn to
//! another server, and shows what passes.

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
    shared: Arc<Shared>,
    up: mpsc::UnboundedReceiver<Vec<u8>>,
    down: mpsc::UnboundedReceiver<Vec<u8>>,
}

struct Shared {
    client_side: UdpSocket,
    server_side: UdpSocket,
    client: Mutex<Option<SocketAddr>>,
    server: Mutex<SocketAddr>,
    open_up: AtomicBool,
    open_down: AtomicBool,
}

impl Relay {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let shared = Arc::new(Shared {
            client_side: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
            server_side: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
            client: Mutex::new(None),
            server: Mutex::new(server),
            open_up: AtomicBool::new(true),
            open_down: AtomicBool::new(true),
        });
        let addr = shared.client_side.local_addr().unwrap();
        let (ups, up) = mpsc::unbounded_channel();
        let (downs, down) = mpsc::unbounded_channel();
        tokio::spawn(pass(Arc::clone(&shared), ups, downs));
        Self { addr, shared, up, down }
    }

    /// What the client sends is dropped, or not.
    pub(crate) fn set_up(&self, open: bool) {
        self.shared.open_up.store(open, Ordering::SeqCst);
    }

    /// What the server sends is dropped, or not.
    pub(crate) fn set_down(&self, open: bool) {
        self.shared.open_down.store(open, Ordering::SeqCst);
    }

    /// What the client sends goes to this server from now on, from the same address as before.
    pub(crate) fn turn_to(&self, server: SocketAddr) {
        *self.shared.server.lock() = server;
    }

    /// The client's next datagram, passed on or dropped.
    pub(crate) async fn next_up(&mut self) -> Vec<u8> {
        within(self.up.recv()).await.unwrap()
    }

    /// The server's next datagram, passed on or dropped.
    pub(crate) async fn next_down(&mut self) -> Vec<u8> {
        within(self.down.recv()).await.unwrap()
    }

    /// Forgets the server's datagrams until now.
    pub(crate) fn forget_down(&mut self) {
        while self.down.try_recv().is_ok() {}
    }

    /// Forgets the client's datagrams until now.
    pub(crate) fn forget_up(&mut self) {
        while self.up.try_recv().is_ok() {}
    }

    /// Sends to the server as if the client had.
    pub(crate) async fn send_up(&self, datagram: &[u8]) {
        let server = *self.shared.server.lock();
        self.shared.server_side.send_to(datagram, server).await.unwrap();
    }

    /// Sends to the client as if the server had.
    pub(crate) async fn send_down(&self, datagram: &[u8]) {
        let client = self.shared.client.lock().expect("the client has sent something");
        self.shared.client_side.send_to(datagram, client).await.unwrap();
    }
}

async fn pass(
    shared: Arc<Shared>,
    ups: mpsc::UnboundedSender<Vec<u8>>,
    downs: mpsc::UnboundedSender<Vec<u8>>,
) {
    let (mut up_buffer, mut down_buffer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            Ok((len, from)) = shared.client_side.recv_from(&mut up_buffer) => {
                *shared.client.lock() = Some(from);
                let datagram = &up_buffer[..len];
                let server = *shared.server.lock();
                if shared.open_up.load(Ordering::SeqCst) {
                    let _ = shared.server_side.send_to(datagram, server).await;
                }
                if ups.send(datagram.to_vec()).is_err() {
                    return;
                }
            }
            Ok((len, _)) = shared.server_side.recv_from(&mut down_buffer) => {
                let datagram = &down_buffer[..len];
                if downs.send(datagram.to_vec()).is_err() {
                    return;
                }
                let client = *shared.client.lock();
                if let (true, Some(client)) = (shared.open_down.load(Ordering::SeqCst), client) {
                    let _ = shared.client_side.send_to(datagram, client).await;
                }
            }
        }
    }
}
