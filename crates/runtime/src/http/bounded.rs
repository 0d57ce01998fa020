//! The TCP connections of the HTTP port, bounded in number and time.
//!
//! Idle connections would otherwise use up the process's descriptors, and `/livez` would fail
//! although the service works. At the cap the oldest connection makes room for a new one, so that a
//! probe always gets through, and no connection lives longer than [`LIFETIME`].

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use nix::sys::resource::{Resource, getrlimit};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::{Sleep, sleep},
};

/// The maximum number of connections, if the process has enough descriptors.
const MAX_CONNECTIONS: usize = 64;

/// The divisor of the process's descriptor limit. Connections use at most the quotient.
const SHARE_OF_DESCRIPTORS: u64 = 4;

/// The maximum lifetime of a connection. Each scrape opens a new one.
const LIFETIME: Duration = Duration::from_secs(10);

/// The pause before a retry if the system has no descriptor left.
const RETRY: Duration = Duration::from_millis(100);

/// A listener with a maximum number of open connections.
pub(super) struct Bounded {
    listener: TcpListener,
    max: usize,
    open: Arc<Open>,
}

/// The open connections, the oldest first. Dropping a sender ends its connection.
#[derive(Default)]
struct Open(Mutex<VecDeque<(u64, oneshot::Sender<()>)>>);

/// One connection.
pub(super) struct BoundedConnection {
    stream: TcpStream,
    lifetime: Pin<Box<Sleep>>,
    evicted: oneshot::Receiver<()>,
    open: Weak<Open>,
    number: u64,
}

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self { listener, max: max_connections(), open: Arc::default() }
    }

    fn admit(&self, stream: TcpStream, number: u64) -> BoundedConnection {
        let (place, evicted) = oneshot::channel();
        let mut open = self.open.0.lock();
        while open.len() >= self.max {
            open.pop_front();
        }
        open.push_back((number, place));
        let lifetime = Box::pin(sleep(LIFETIME));
        BoundedConnection { stream, lifetime, evicted, open: Arc::downgrade(&self.open), number }
    }
}

/// Returns the maximum number of connections: a share of the process's descriptor limit.
fn max_connections() -> usize {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let share = usize::try_from(descriptors / SHARE_OF_DESCRIPTORS).unwrap_or(usize::MAX);
    share.clamp(1, MAX_CONNECTIONS)
}

impl Listener for Bounded {
    type Io = BoundedConnection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedConnection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, addr)) => {
                    let number = self.open.0.lock().back().map_or(0, |(last, _)| last + 1);
                    return (self.admit(stream, number), addr);
                }
                Err(error) => {
                    tracing::debug!(%error, "an HTTP connection could not be accepted");
                    sleep(RETRY).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl BoundedConnection {
    /// Returns an error once the connection is evicted or has reached [`LIFETIME`].
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if Pin::new(&mut self.evicted).poll(cx).is_ready() {
            return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
        }
        ready!(self.lifetime.as_mut().poll(cx));
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }
}

impl Drop for BoundedConnection {
    fn drop(&mut self) {
        if let Some(open) = self.open.upgrade() {
            open.0.lock().retain(|(number, _)| *number != self.number);
        }
    }
}

impl AsyncRead for BoundedConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_end(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for BoundedConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(error) = self.poll_end(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn at_the_cap_the_oldest_connection_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut bounded = Bounded { listener, max: 2, open: Arc::default() };
        let (mut clients, mut served) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            clients.push(TcpStream::connect(addr).await.unwrap());
            served.push(bounded.accept().await.0);
        }
        let ended = served[0].read_u8().await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(bounded.open.0.lock().len(), 2);
        served.clear();
        assert!(bounded.open.0.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_ends_with_a_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut bounded = Bounded::new(listener);
        let (client, accepted) = tokio::join!(TcpStream::connect(addr), bounded.accept());
        let (_client, mut served) = (client.unwrap(), accepted.0);
        let ended = served.read_u8().await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn the_connection_limit_is_at_least_one_and_at_most_max_connections() {
        assert!((1..=MAX_CONNECTIONS).contains(&max_connections()));
    }
}
