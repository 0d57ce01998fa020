//! A minimal UDP load balancer: assigns each new flow to the next target in turn. A flow stays with
//! its target, also while the target does not run.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::{net::UdpSocket, task::JoinSet};

const LARGEST: usize = 65_535;

/// A balancer on a port of 127.0.0.1. Dropping it ends it.
#[derive(Debug)]
pub struct Balancer {
    addr: SocketAddr,
    targets: Arc<Mutex<Vec<SocketAddr>>>,
    _task: JoinSet<()>,
}

impl Balancer {
    pub async fn start(targets: &[SocketAddr]) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
        let addr = socket.local_addr()?;
        let targets = Arc::new(Mutex::new(targets.to_vec()));
        let mut task = JoinSet::new();
        task.spawn(balance(socket, Arc::clone(&targets)));
        Ok(Self { addr, targets, _task: task })
    }

    /// Returns the address for clients.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Sets the targets of new flows. Existing flows stay with their targets.
    pub fn aim(&self, targets: &[SocketAddr]) {
        *self.targets.lock() = targets.to_vec();
    }
}

async fn balance(front: Arc<UdpSocket>, targets: Arc<Mutex<Vec<SocketAddr>>>) {
    let mut flows: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut answers = JoinSet::new();
    let mut datagram = vec![0; LARGEST];
    loop {
        // An error loses one datagram.
        let Ok((length, client)) = front.recv_from(&mut datagram).await else { continue };
        if !flows.contains_key(&client) {
            let target = {
                let targets = targets.lock();
                targets[flows.len() % targets.len()]
            };
            let Ok(back) = flow(target).await else { continue };
            let back = Arc::new(back);
            answers.spawn(answer(Arc::clone(&back), Arc::clone(&front), client));
            flows.insert(client, back);
        }
        let _ = flows[&client].send(&datagram[..length]).await;
    }
}

async fn flow(target: SocketAddr) -> io::Result<UdpSocket> {
    let back = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    back.connect(target).await?;
    Ok(back)
}

async fn answer(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr) {
    let mut datagram = vec![0; LARGEST];
    loop {
        // An error means that no process listens at the target.
        if let Ok(length) = back.recv(&mut datagram).await {
            let _ = front.send_to(&datagram[..length], client).await;
        }
    }
}
