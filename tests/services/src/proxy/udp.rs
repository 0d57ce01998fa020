//! The UDP proxy: one task for each client's flow, with its own socket to the target.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, hash_map::Entry},
    future::pending,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{net::UdpSocket, sync::mpsc, task::JoinSet, time::Instant};

use super::{
    AbortOnDrop, Link, Switch, Way,
    lane::{Fate, Lane, until},
};

const LARGEST: usize = 65_535;
/// The maximum number of datagrams of one flow in transit; more are lost, as in a full router
/// queue.
const MAX_IN_TRANSIT: usize = 4_096;

/// Forwards datagrams from a port of 127.0.0.1 to a target and back. Dropping it ends all flows.
#[derive(Debug)]
pub struct UdpProxy {
    addr: SocketAddr,
    switch: Switch,
    _task: AbortOnDrop,
}

impl UdpProxy {
    pub async fn start(target: SocketAddr, random: StdRng) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = socket.local_addr()?;
        let switch = Switch::new();
        let task = tokio::spawn(receive(Arc::new(socket), target, random, switch.clone()));
        Ok(Self { addr, switch, _task: AbortOnDrop::new(&task) })
    }

    /// Returns the address for clients.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub const fn switch(&self) -> &Switch {
        &self.switch
    }
}

async fn receive(socket: Arc<UdpSocket>, target: SocketAddr, random: StdRng, switch: Switch) {
    let (mut cuts, mut faults) = (switch.watch_cuts(), switch.watch_faults());
    let mut flows = Flows { target, random, switch, open: HashMap::new(), tasks: JoinSet::new() };
    let mut buffer = vec![0; LARGEST];
    loop {
        tokio::select! {
            biased;
            _ = cuts.changed() => flows.forget(),
            _ = faults.changed() => {
                if faults.borrow_and_update().link == Link::Reset {
                    flows.forget();
                }
            }
            Some(_) = flows.tasks.join_next() => {}
            received = socket.recv_from(&mut buffer) => {
                let Ok((length, client)) = received else { continue };
                let is_reset = faults.borrow().link == Link::Reset;
                let datagram = buffer[..length].to_vec();
                if is_reset || flows.forward(client, &socket, datagram).await.is_none() {
                    flows.switch.count(|s| &s.lost);
                }
            }
        }
    }
}

struct Flows {
    target: SocketAddr,
    random: StdRng,
    switch: Switch,
    open: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>>,
    tasks: JoinSet<()>,
}

impl Flows {
    /// Passes a datagram to its client's flow, which is started if there is none. Returns `None` if
    /// that is impossible.
    async fn forward(
        &mut self,
        client: SocketAddr,
        front: &Arc<UdpSocket>,
        datagram: Vec<u8>,
    ) -> Option<()> {
        let flow = match self.open.entry(client) {
            Entry::Occupied(flow) => flow.into_mut(),
            Entry::Vacant(place) => {
                let own = StdRng::from_rng(&mut self.random).ok()?;
                let flow = Flow::begin(client, self.target, front, own, &self.switch).await.ok()?;
                let (sender, receiver) = mpsc::channel(MAX_IN_TRANSIT);
                self.tasks.spawn(flow.run(receiver));
                place.insert(sender)
            }
        };
        flow.try_send(datagram).ok()
    }

    /// Ends all flows. Datagrams in transit are lost.
    fn forget(&mut self) {
        for _ in self.open.drain() {
            self.switch.count(|s| &s.cut);
        }
        self.tasks.abort_all();
    }
}

struct Flow {
    client: SocketAddr,
    /// The socket for clients, shared by all flows.
    front: Arc<UdpSocket>,
    /// The flow's socket to the target.
    back: UdpSocket,
    lanes: [Lane; 2],
    switch: Switch,
    /// Datagrams that wait for their time.
    waiting: BinaryHeap<Reverse<Waiting>>,
    number: u64,
}

/// A datagram that waits, ordered by time, then by number.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    at: Instant,
    number: u64,
    direction: Direction,
    datagram: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    ToTarget,
    ToClient,
}

impl Flow {
    async fn begin(
        client: SocketAddr,
        target: SocketAddr,
        front: &Arc<UdpSocket>,
        mut random: StdRng,
        switch: &Switch,
    ) -> io::Result<Self> {
        let back = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        back.connect(target).await?;
        switch.count(|s| &s.begun);
        let now = Instant::now();
        let mut lane = |way| {
            io::Result::Ok(Lane::new(
                way,
                StdRng::from_rng(&mut random).map_err(io::Error::other)?,
                now,
            ))
        };
        Ok(Self {
            client,
            front: Arc::clone(front),
            back,
            lanes: [lane(Way::ToTarget)?, lane(Way::ToClient)?],
            switch: switch.clone(),
            waiting: BinaryHeap::new(),
            number: 0,
        })
    }

    async fn run(mut self, mut from_client: mpsc::Receiver<Vec<u8>>) {
        let mut buffer = vec![0; LARGEST];
        loop {
            let next = self.waiting.peek().map(|Reverse(waiting)| waiting.at);
            let is_due = async {
                match next {
                    Some(at) => until(at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                () = is_due => self.pass().await,
                received = from_client.recv() => {
                    let Some(datagram) = received else { return };
                    self.admit(Direction::ToTarget, datagram);
                }
                received = self.back.recv(&mut buffer) => {
                    // An error means that no process listens at the target: the datagram is lost.
                    if let Ok(length) = received {
                        self.admit(Direction::ToClient, buffer[..length].to_vec());
                    }
                }
            }
        }
    }

    /// Decides the fate of a datagram.
    fn admit(&mut self, direction: Direction, datagram: Vec<u8>) {
        let faults = self.switch.faults();
        let fate = self.lanes[direction as usize].fate(Instant::now(), datagram.len(), &faults);
        let Fate::Goes { at, twice, held_back } = fate else {
            return self.switch.count(|s| &s.lost);
        };
        if self.waiting.len() >= MAX_IN_TRANSIT {
            return self.switch.count(|s| &s.lost);
        }
        if held_back {
            self.switch.count(|s| &s.held_back);
        }
        if twice {
            self.switch.count(|s| &s.doubled);
            self.enqueue(at, direction, datagram.clone());
        }
        self.enqueue(at, direction, datagram);
    }

    fn enqueue(&mut self, at: Instant, direction: Direction, datagram: Vec<u8>) {
        self.waiting.push(Reverse(Waiting { at, number: self.number, direction, datagram }));
        self.number += 1;
    }

    /// Sends the datagram that is due first.
    async fn pass(&mut self) {
        let Some(Reverse(Waiting { direction, datagram, .. })) = self.waiting.pop() else { return };
        let sent = match direction {
            Direction::ToTarget => self.back.send(&datagram).await,
            Direction::ToClient => self.front.send_to(&datagram, self.client).await,
        };
        match sent {
            Ok(_) => self.switch.count(|s| &s.passed),
            Err(_) => self.switch.count(|s| &s.lost),
        }
    }
}
