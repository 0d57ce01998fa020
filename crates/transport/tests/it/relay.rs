//! A UDP relay between one client and the server that can go deaf in either direction and shows what passes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{net::UdpSocket, sync::mpsc};

use crate::support::within;

pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    open_up: Arc<AtomicBool>,
    open_down: Arc<AtomicBool>,
    down: mpsc::UnboundedReceiver<Vec<u8>>,
}

impl Relay {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let client_side = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let server_side = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        server_side.connect(server).await.unwrap();
        let addr = client_side.local_addr().unwrap();
        let (open_up, open_down) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(true)));
        let (sender, down) = mpsc::unbounded_channel();
        let (up, down_too) = (Arc::clone(&open_up), Arc::clone(&open_down));
        tokio::spawn(async move {
            let (mut up_buffer, mut down_buffer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((len, from)) = client_side.recv_from(&mut up_buffer) => {
                        client = Some(from);
                        if up.load(Ordering::SeqCst) {
                            let _ = server_side.send(&up_buffer[..len]).await;
                        }
                    }
                    Ok(len) = server_side.recv(&mut down_buffer) => {
                        let datagram = &down_buffer[..len];
                        if sender.send(datagram.to_vec()).is_err() {
                            return;
                        }
                        if let (true, Some(client)) = (down_too.load(Ordering::SeqCst), client) {
                            let _ = client_side.send_to(datagram, client).await;
                        }
                    }
                }
            }
        });
        Self { addr, open_up, open_down, down }
    }

    /// What the client sends is dropped, or not.
    pub(crate) fn set_up(&self, open: bool) {
        self.open_up.store(open, Ordering::SeqCst);
    }

    /// What the server sends is dropped, or not.
    pub(crate) fn set_down(&self, open: bool) {
        self.open_down.store(open, Ordering::SeqCst);
    }

    /// The server's next datagram, passed on or dropped.
    pub(crate) async fn next_down(&mut self) -> Vec<u8> {
        within(self.down.recv()).await.unwrap()
    }

    /// Forgets the server's datagrams until now.
    pub(crate) fn forget_down(&mut self) {
        while self.down.try_recv().is_ok() {}
    }
}
