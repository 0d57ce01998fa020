//! The TCP proxy: one task for each connection, which forwards both directions.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::pin,
};

use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    AbortOnDrop, Faults, Link, Switch, Way,
    lane::{Lane, Throttle, until},
};

const CHUNK: usize = 16 * 1024;
/// The maximum number of chunks in transit in one direction; then the sender waits.
const MAX_IN_TRANSIT: usize = 64;
/// The number of pieces per second in which a throttled stream is sent.
const PIECES_PER_SECOND: u64 = 50;

/// Forwards TCP connections from a port of 127.0.0.1 to a target. Dropping it ends all connections.
#[derive(Debug)]
pub struct TcpProxy {
    addr: SocketAddr,
    switch: Switch,
    _task: AbortOnDrop,
}

impl TcpProxy {
    pub async fn start(target: SocketAddr, random: StdRng) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = listener.local_addr()?;
        let switch = Switch::new();
        let task = tokio::spawn(accept(listener, target, random, switch.clone()));
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

async fn accept(listener: TcpListener, target: SocketAddr, mut random: StdRng, switch: Switch) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // An error concerns only that connection, which has ended.
                let Ok((client, _)) = accepted else { continue };
                let Ok(own) = StdRng::from_rng(&mut random) else { continue };
                switch.count(|s| &s.begun);
                // Subscribed before the task starts, so that no cut is missed.
                let watched = (switch.watch_faults(), switch.watch_cuts());
                connections.spawn(forward(client, target, own, watched));
            }
            Some(ended) = connections.join_next() => {
                if !matches!(ended, Ok(Ok(Ended::ByPeers))) {
                    switch.count(|s| &s.cut);
                }
            }
        }
    }
}

type Watched = (watch::Receiver<Faults>, watch::Receiver<u64>);

/// The end of a connection: by its peers, or by a cut.
#[derive(PartialEq, Eq)]
enum Ended {
    ByPeers,
    Cut,
}

async fn forward(
    client: TcpStream,
    target: SocketAddr,
    random: StdRng,
    watched: Watched,
) -> io::Result<Ended> {
    let (mut faults, mut cuts) = watched;
    let (mut to_target, for_pumps) = (faults.clone(), faults.clone());
    let mut cut = pin!(async {
        tokio::select! {
            _ = cuts.changed() => {}
            _ = faults.wait_for(|f| f.link == Link::Reset) => {}
        }
    });
    tokio::select! {
        biased;
        () = &mut cut => return reset([client]),
        open = passable(&mut to_target, Way::ToTarget) => open?,
    }
    let mut connecting = pin!(TcpStream::connect(target));
    let server = tokio::select! {
        biased;
        () = &mut cut => {
            reset([client])?;
            // The connection is completed first: if it were dropped while it connects, the target
            // would see an orderly end.
            return reset([connecting.await?]);
        }
        connected = &mut connecting => match connected {
            Ok(server) => server,
            Err(_) => return reset([client]),
        },
    };
    let (mut client, mut server) = (client, server);
    let ended = tokio::select! {
        biased;
        () = &mut cut => Ended::Cut,
        ended = relay(&mut client, &mut server, random, for_pumps) => match ended {
            Ok(()) => Ended::ByPeers,
            Err(_) => Ended::Cut,
        },
    };
    match ended {
        Ended::ByPeers => Ok(Ended::ByPeers),
        Ended::Cut => reset([client, server]),
    }
}

/// Closes connections with a reset, without sending buffered data.
fn reset<const N: usize>(streams: [TcpStream; N]) -> io::Result<Ended> {
    for stream in streams {
        stream.set_zero_linger()?;
    }
    Ok(Ended::Cut)
}

/// Forwards both directions, each until its sender ends it.
async fn relay(
    client: &mut TcpStream,
    server: &mut TcpStream,
    mut random: StdRng,
    faults: watch::Receiver<Faults>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let now = Instant::now();
    let mut lane = |way| {
        io::Result::Ok(Lane::new(
            way,
            StdRng::from_rng(&mut random).map_err(io::Error::other)?,
            now,
        ))
    };
    let (there, back) = (lane(Way::ToTarget)?, lane(Way::ToClient)?);
    tokio::try_join!(
        pump(from_client, to_server, there, faults.clone()),
        pump(from_server, to_client, back, faults)
    )?;
    Ok(())
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut lane: Lane,
    mut faults: watch::Receiver<Faults>,
) -> io::Result<()> {
    let way = lane.way;
    let mut throttle = Throttle::new(Instant::now());
    let (queue, mut queued) = mpsc::channel(MAX_IN_TRANSIT);
    let current = faults.clone();
    let take = async move {
        loop {
            let mut chunk = vec![0; CHUNK];
            let length = from.read(&mut chunk).await?;
            if length == 0 {
                return Ok(());
            }
            chunk.truncate(length);
            let due = lane.due(Instant::now(), &current.borrow());
            if queue.send((due, chunk)).await.is_err() {
                return Ok(());
            }
        }
    };
    let give = async move {
        while let Some((due, chunk)) = queued.recv().await {
            until(due).await;
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                passable(&mut faults, way).await?;
                let now = *faults.borrow();
                let piece = now
                    .throttle
                    .map_or(CHUNK as u64, |rate| rate.get().div_ceil(PIECES_PER_SECOND));
                let length = rest.len().min(usize::try_from(piece).unwrap_or(CHUNK));
                until(throttle.after(Instant::now(), length, &now)).await;
                to.write_all(&rest[..length]).await?;
                rest = &rest[length..];
            }
        }
        passable(&mut faults, way).await?;
        to.shutdown().await
    };
    tokio::try_join!(take, give)?;
    Ok(())
}

/// Waits until the link forwards data in this direction.
async fn passable(faults: &mut watch::Receiver<Faults>, way: Way) -> io::Result<()> {
    faults.wait_for(|f| !f.blocks(way)).await.map_err(io::Error::other)?;
    Ok(())
}
