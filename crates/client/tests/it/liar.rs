//! Servers whose answers to Peek are false. Every call is passed on to an honest server; the
//! answers to Peek are changed on the way back.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use prost::Message as _;
use qpq_client::{
    CallError, Error, Fingerprint, Messenger, Method as _, Options, Status, Trust, methods, v1,
};
use qpq_transport::{
    Certificates, Config, DeliveryObserver, EventSink, Peer, Reply, Service,
    client::{self as transport, Connection, Dialer},
};
use qpq_wire::{Refusal, Request, RequestHeader};
use tempfile::TempDir;
use tokio::sync::{Notify, OnceCell};

use crate::harness::{Server, dm, password, read, soon, username};

/// A change to an answer to Peek.
type Lie = Box<dyn FnMut(v1::PeekResponse) -> v1::PeekResponse + Send>;

/// A server between the clients and an honest one.
pub(crate) struct Liar {
    service: Arc<Relay>,
    /// `None` while the server is replaced.
    server: Option<qpq_transport::Server<Relay>>,
    certificates: Arc<Certificates>,
    pub(crate) fingerprint: Fingerprint,
    _dir: TempDir,
}

struct Relay {
    honest: SocketAddr,
    dialer: Dialer,
    lie: Mutex<Option<Lie>>,
    peeks: Mutex<usize>,
    fails_acks: AtomicBool,
    /// Whether Acks are neither passed on nor answered.
    parks_acks: AtomicBool,
    /// Notified when a client has received an answer to Peek.
    peeked: Arc<Notify>,
    /// The ids of the methods of all calls.
    calls: Mutex<Vec<u16>>,
}

impl Liar {
    pub(crate) fn before(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.der"), dir.path().join("key.der"));
        let certificates =
            Certificates::load_or_create(&cert, &key, &["localhost".to_owned()]).unwrap();
        let service = Arc::new(Relay {
            honest: server.addr,
            dialer: Dialer::new(transport::Trust::Pin(server.fingerprint)).unwrap(),
            lie: Mutex::default(),
            peeks: Mutex::default(),
            fails_acks: AtomicBool::default(),
            parks_acks: AtomicBool::default(),
            peeked: Arc::default(),
            calls: Mutex::default(),
        });
        let fingerprint = certificates.fingerprint();
        let config = Config::new(([127, 0, 0, 1], 0).into());
        let server =
            qpq_transport::Server::bind(config, Arc::clone(&certificates), Arc::clone(&service))
                .unwrap();
        Self { service, server: Some(server), certificates, fingerprint, _dir: dir }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.server.as_ref().expect("it runs").local_addr()
    }

    /// Ends all connections of clients and accepts new ones at the same address.
    async fn end_connections(&mut self) {
        let config = Config::new(self.addr());
        let server = self.server.take().expect("it runs");
        server.abort().await;
        drop(server);
        let bind = || {
            let (certificates, service) =
                (Arc::clone(&self.certificates), Arc::clone(&self.service));
            qpq_transport::Server::bind(config.clone(), certificates, service)
        };
        // The port is free once the tasks of the old endpoint have ended.
        let mut bound = bind();
        while bound.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            bound = bind();
        }
        self.server = Some(bound.unwrap());
    }

    async fn user(&self, server: &Server, name: &str) -> Messenger {
        let addr = self.addr().to_string();
        let options = Options::new(addr, Trust::Pinned(self.fingerprint));
        let dir = server.profile(name);
        Messenger::register(&dir, options, &username(name), &password(), None).await.unwrap()
    }

    /// Changes the answers to Peek from now on.
    pub(crate) fn lie(
        &self,
        lie: impl FnMut(v1::PeekResponse) -> v1::PeekResponse + Send + 'static,
    ) {
        *self.service.lie.lock() = Some(Box::new(lie));
    }

    pub(crate) fn be_honest(&self) {
        *self.service.lie.lock() = None;
    }

    fn peeks(&self) -> usize {
        *self.service.peeks.lock()
    }

    /// Returns the Peeks and Acks since the last time, in their order.
    fn take_reads(&self) -> Vec<&'static str> {
        let calls = std::mem::take(&mut *self.service.calls.lock());
        let reads = [methods::Peek::INFO, methods::Ack::INFO];
        let name = |id| reads.iter().find(|info| info.id == id).map(|info| info.name);
        calls.into_iter().filter_map(name).collect()
    }
}

impl Relay {
    fn change(&self, payload: Bytes) -> Bytes {
        *self.peeks.lock() += 1;
        match &mut *self.lie.lock() {
            Some(lie) => lie(v1::PeekResponse::decode(payload).unwrap()).encode_to_vec().into(),
            None => payload,
        }
    }
}

impl Service for Relay {
    /// The connection to the honest server, from the first call on.
    type Connection = OnceCell<Connection>;

    fn connected(&self, _: Peer, _: EventSink) -> Arc<Self::Connection> {
        Arc::default()
    }

    fn admit(&self, _: &Self::Connection, _: &RequestHeader) -> Result<(), Reply> {
        Ok(())
    }

    async fn call(self: Arc<Self>, conn: Arc<Self::Connection>, request: Request) -> Reply {
        let honest = conn
            .get_or_try_init(|| self.dialer.connect(self.honest, "localhost"))
            .await
            .expect("the honest server runs");
        let Request { method_id, request_id, payload } = request;
        self.calls.lock().push(method_id);
        if method_id == methods::Ack::INFO.id && self.fails_acks.load(Ordering::Relaxed) {
            return Reply::new(u8::from(Status::Unavailable), Bytes::new());
        }
        if method_id == methods::Ack::INFO.id && self.parks_acks.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        let (status, answer) = honest
            .call(method_id, payload, request_id, Duration::from_secs(60))
            .await
            .expect("the honest server answers");
        if method_id == methods::Peek::INFO.id && status == 0 {
            let on_delivery = Box::new(Peeked(Arc::clone(&self.peeked)));
            let reply = Reply::new(status, self.change(answer));
            return Reply { on_delivery: Some(on_delivery), ..reply };
        }
        Reply::new(status, answer)
    }

    fn refuse(&self, _: &Self::Connection, _: Option<&RequestHeader>, why: Refusal) -> Reply {
        panic!("the client's requests are well formed: {why:?}")
    }
}

struct Peeked(Arc<Notify>);

impl DeliveryObserver for Peeked {
    fn delivered(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move { self.0.notify_one() })
    }

    fn lost(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

#[tokio::test]
async fn an_impossible_seq_is_refused_and_the_next_honest_answer_is_read_in_full() {
    let server = Server::start().await;
    let liar = Liar::before(&server);
    let (alice, bob) = (server.user("alice").await, liar.user(&server, "bob").await);
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "one").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: one"]);
    for (number, seq) in [u64::MAX, u64::MAX - 1, 1 << 60].into_iter().enumerate() {
        let texts = ["first", "second"].map(|text| format!("{text} after {number}"));
        for text in &texts {
            alice.send(with_bob, text).await.unwrap();
        }
        liar.lie(move |mut page| {
            page.payloads.last_mut().expect("two messages wait").seq = seq;
            page
        });
        let refused = bob.receive().await.unwrap_err();
        let Error::Call(CallError::ImpossibleSeq { seq: named }) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!(*named, seq);
        assert!(bob.unseen().await.unwrap().is_empty(), "nothing of that answer is kept");
        liar.be_honest();
        assert_eq!(read(&bob).await, texts.map(|text| format!("alice: {text}")));
    }
}

#[tokio::test]
async fn a_repeated_page_ends_the_read_and_is_shown_once() {
    let server = Server::start().await;
    let liar = Liar::before(&server);
    let (alice, bob) = (server.user("alice").await, liar.user(&server, "bob").await);
    let with_bob = dm(&alice, "bob").await;
    for text in ["one", "two"] {
        alice.send(with_bob, text).await.unwrap();
    }
    let mut first = None;
    liar.lie(move |page| {
        let page = first.get_or_insert(page);
        v1::PeekResponse { more: true, ..page.clone() }
    });
    let before = liar.peeks();
    let refused = soon(bob.receive()).await.unwrap_err();
    assert!(matches!(refused, Error::Call(CallError::Malformed { method: "Peek" })), "{refused:?}");
    assert_eq!(liar.peeks() - before, 2);
    liar.be_honest();
    alice.send(with_bob, "three").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: one", "alice: two", "alice: three"]);
    assert!(read(&bob).await.is_empty());
}

/// A repeated Ack can reach a server whose store was restored since the Peek. The same seqs are
/// those of other messages there.
#[tokio::test]
async fn an_ack_that_fails_is_left_to_the_next_read() {
    let server = Server::start().await;
    let liar = Liar::before(&server);
    let (alice, bob) = (server.user("alice").await, liar.user(&server, "bob").await);
    let with_bob = dm(&alice, "bob").await;
    read(&bob).await;
    alice.send(with_bob, "one").await.unwrap();
    liar.take_reads();
    liar.service.fails_acks.store(true, Ordering::Relaxed);
    assert_eq!(read(&bob).await, ["alice: one"]);
    assert_eq!(liar.take_reads(), ["Peek", "Ack"]);
    liar.service.fails_acks.store(false, Ordering::Relaxed);
    assert!(read(&bob).await.is_empty(), "the message is recognized");
    assert_eq!(liar.take_reads(), ["Peek", "Ack"]);
    assert!(read(&bob).await.is_empty());
    assert_eq!(liar.take_reads(), ["Peek"], "the inbox is empty");
}

#[tokio::test]
async fn an_ack_is_not_sent_on_another_connection_than_its_peek() {
    let server = Server::start().await;
    let mut liar = Liar::before(&server);
    let (alice, bob) = (server.user("alice").await, liar.user(&server, "bob").await);
    let with_bob = dm(&alice, "bob").await;
    read(&bob).await;
    alice.send(with_bob, "one").await.unwrap();
    let peeked = Arc::clone(&liar.service.peeked);
    // Drops the notifications of earlier answers.
    let _ = soon(peeked.notified()).now_or_never();
    liar.service.parks_acks.store(true, Ordering::Relaxed);
    liar.take_reads();
    let (shown, ()) = soon(async {
        tokio::join!(Box::pin(read(&bob)), async {
            peeked.notified().await;
            liar.end_connections().await;
        })
    })
    .await;
    assert_eq!(shown, ["alice: one"]);
    // An Ack that was on its way when the connection ended was not passed on, and none followed.
    let reads = liar.take_reads();
    assert!(reads == ["Peek"] || reads == ["Peek", "Ack"], "{reads:?}");

    liar.service.parks_acks.store(false, Ordering::Relaxed);
    alice.send(with_bob, "two").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: two"], "the first one is recognized");
    assert_eq!(liar.take_reads(), ["Peek", "Ack"]);
    assert!(read(&bob).await.is_empty());
    assert_eq!(liar.take_reads(), ["Peek"], "the inbox is empty");
}
