//! A network between client and server that can swallow packets.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::{net::UdpSocket, task::JoinHandle};

/// Passes datagrams on, each client port from a port of its own. Can drop the answers to some
/// ports.
pub(crate) struct Network {
    pub(crate) addr: SocketAddr,
    flows: Arc<Mutex<Flows>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Flows {
    sockets: HashMap<SocketAddr, Arc<UdpSocket>>,
    deaf: HashSet<SocketAddr>,
}

impl Network {
    pub(crate) async fn before(server: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let flows = Arc::new(Mutex::new(Flows::default()));
        let addr = front.local_addr().unwrap();
        let task = tokio::spawn(forward(front, server, Arc::clone(&flows)));
        Self { addr, flows, task }
    }

    /// Drops all answers to the ports that clients have used so far. Datagrams from these ports
    /// still arrive.
    pub(crate) fn swallow_answers(&self) {
        let mut flows = self.flows.lock();
        flows.deaf = flows.sockets.keys().copied().collect();
    }

    /// Returns the number of ports that clients have used.
    pub(crate) fn ports(&self) -> usize {
        self.flows.lock().sockets.len()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(front: Arc<UdpSocket>, server: SocketAddr, flows: Arc<Mutex<Flows>>) {
    let mut datagram = vec![0; 65_536];
    loop {
        let (len, client) = front.recv_from(&mut datagram).await.unwrap();
        let known = flows.lock().sockets.get(&client).cloned();
        let back = match known {
            Some(back) => back,
            None => {
                let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                back.connect(server).await.unwrap();
                flows.lock().sockets.insert(client, Arc::clone(&back));
                tokio::spawn(answer(
                    Arc::clone(&front),
                    Arc::clone(&back),
                    client,
                    Arc::clone(&flows),
                ));
                back
            }
        };
        // QUIC retransmits a datagram that is lost here.
        let _ = back.send(&datagram[..len]).await;
    }
}

async fn answer(
    front: Arc<UdpSocket>,
    back: Arc<UdpSocket>,
    client: SocketAddr,
    flows: Arc<Mutex<Flows>>,
) {
    let mut datagram = vec![0; 65_536];
    while let Ok(len) = back.recv(&mut datagram).await {
        if !flows.lock().deaf.contains(&client) {
            let _ = front.send_to(&datagram[..len], client).await;
        }
    }
}
