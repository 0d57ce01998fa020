//! Tests of the table and of the order of a call's steps.

use std::{cell::RefCell, future::pending, net::Ipv4Addr, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use qpq_domain::{StoreLimits, UnixMillis};
use qpq_ports::{Bucket, Clock, LimitKey, RateLimiter, StoreResult, Verdict};
use qpq_proto::{
    LimitSubject, auth as marker,
    methods::{Enqueue, FetchWait, Health, RelayEnqueue},
    v1::{RelayEnqueueRequest, RelayEnqueueResponse},
};
use qpq_store_embedded::EmbeddedStore;
use rand::rngs::OsRng;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    AtRestKeys, Config, DeliverySigner, Events, OpaqueServer, Parts, RateLimits, auth::Principal,
};

fn size<'a, F: Future>(_: impl Fn(Cx<'a>, Bytes) -> F) -> usize {
    size_of::<F>()
}

/// An idle client costs its connection and the future of a waiting FetchWait.
#[test]
fn futures_of_served_calls_take_at_most_2_kib() {
    let sizes = [size(serve::<Health>), size(serve::<Enqueue>), size(serve::<FetchWait>)];
    assert!(sizes.iter().all(|size| *size <= 2_048), "{sizes:?}");
}

#[test]
fn every_served_method_is_found_by_its_id() {
    for (index, entry) in TABLE.iter().enumerate() {
        assert_eq!(row(entry.info.id), Some(index));
    }
    let served: Vec<_> = qpq_proto::METHODS.iter().filter(|method| method.served).collect();
    assert_eq!(served.len(), TABLE.len());
}

thread_local! {
    /// The steps of the call under test, which runs on the test's own thread.
    static STEPS: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

fn record(step: &'static str) {
    STEPS.with_borrow_mut(|steps| steps.push(step));
}

fn steps() -> Vec<&'static str> {
    STEPS.take()
}

/// The method of these tests: a call from a peer server. The request's `destination` selects the
/// outcome of the authorization.
enum Relay {}

impl Method for Relay {
    const INFO: MethodInfo = RelayEnqueue::INFO;
    type Auth = marker::Peer;
    type Deadline = <RelayEnqueue as Method>::Deadline;
    type Retry = <RelayEnqueue as Method>::Retry;
    type Request = RelayEnqueueRequest;
    type Response = RelayEnqueueResponse;
}

#[derive(Debug)]
pub struct PeerServer;

impl Principal for PeerServer {
    fn subject(&self) -> Option<Subject<'_>> {
        Some(Subject::Peer("peer.example"))
    }
}

/// A peer server that may relay to the request's destination.
#[derive(Debug)]
pub struct AllowedPeer;

const UNAUTHENTICATED: &[u8] = b"";
const REFUSED: &str = "refused";
const PENDING: &str = "pending";

impl Authenticate for marker::Peer {
    type Principal = PeerServer;

    async fn authenticate(_: Cx<'_>, payload: &[u8]) -> Result<PeerServer, Error> {
        record("authenticate");
        if payload == UNAUTHENTICATED { Err(Error::SessionRequired) } else { Ok(PeerServer) }
    }
}

impl Authorize<RelayEnqueueRequest> for marker::Peer {
    type Caller = AllowedPeer;

    async fn authorize(
        _: Cx<'_>,
        _: PeerServer,
        request: &RelayEnqueueRequest,
    ) -> Result<AllowedPeer, Error> {
        record("authorize");
        match request.destination.as_str() {
            REFUSED => Err(Error::AdminRequired),
            PENDING => pending().await,
            _ => Ok(AllowedPeer),
        }
    }
}

impl Handler for Relay {
    async fn handle(_: Cx<'_>, _: AllowedPeer, _: RelayEnqueueRequest) -> Handled<Self> {
        record("handle");
        Ok(RelayEnqueueResponse::default().into())
    }
}

/// Records the budget of the peer. Other budgets are not limited.
struct RecordingLimiter(Arc<dyn RateLimiter>);

#[async_trait]
impl RateLimiter for RecordingLimiter {
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict> {
        assert_eq!(Subject::Peer("peer.example").key(), SubjectKey(key.subject));
        assert_eq!(cost, 1);
        record("budget");
        self.0.take(key, bucket, cost, now).await
    }

    async fn remember(&self, _: LimitKey, _: Duration, _: UnixMillis) -> StoreResult<()> {
        Ok(())
    }

    async fn remembers(&self, _: LimitKey, _: UnixMillis) -> StoreResult<bool> {
        Ok(false)
    }
}

struct NoEvents;

impl Events for NoEvents {
    fn send(&self, _: u16, _: Bytes) -> bool {
        false
    }
}

struct Stopped;

impl Clock for Stopped {
    fn now(&self) -> UnixMillis {
        UnixMillis(1_800_000_000_000)
    }
}

/// A server on which the budget of a peer allows `calls` calls.
struct TestServer {
    app: Arc<App>,
    conn: Arc<ClientConnection>,
    _dir: tempfile::TempDir,
}

impl TestServer {
    async fn with_budget(calls: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = EmbeddedStore::open(dir.path(), StoreLimits::default()).await.expect("a store");
        let mut stores = store.stores();
        stores.limiter = Arc::new(RecordingLimiter(stores.limiter));
        let budget = (
            (LimitClass::Federation, LimitSubject::Peer),
            Bucket { burst: calls, per_second: 0.1 },
        );
        let config = Config {
            limits: RateLimits { enabled: true, overrides: [budget].into() },
            ..Config::default()
        };
        let app = App::new(Parts {
            stores,
            clock: Arc::new(Stopped),
            opaque: OpaqueServer::generate(&mut OsRng),
            signer: DeliverySigner::generate(&mut OsRng),
            at_rest: AtRestKeys::parse(&AtRestKeys::generate(&mut OsRng)).expect("valid keys"),
            config,
            draining: CancellationToken::new(),
        });
        let address = (Ipv4Addr::LOCALHOST, 4433).into();
        let conn = ClientConnection::new(address, Arc::new(NoEvents), app.answers.new_connection());
        Self { app: Arc::new(app), conn: Arc::new(conn), _dir: dir }
    }

    async fn call(&self, payload: impl Into<Bytes>) -> Result<Bytes, Error> {
        let cx = Cx { app: &self.app, conn: &self.conn, now: self.app.clock.now() };
        serve::<Relay>(cx, payload.into()).await.map(|answer| answer.payload)
    }

    async fn relay_to(&self, destination: &str) -> Result<Bytes, Error> {
        let request = RelayEnqueueRequest {
            destination: destination.into(),
            ..RelayEnqueueRequest::default()
        };
        self.call(request.encode_to_vec()).await
    }
}

#[tokio::test]
async fn a_call_takes_its_steps_in_order_and_ends_at_the_first_that_fails() {
    let server = TestServer::with_budget(3).await;
    let too_large = Relay::INFO.largest_request.bytes() + 1;
    assert!(matches!(check_size(&server.app, &Relay::INFO, too_large), Err(Error::TooLarge)));
    assert!(steps().is_empty());

    let outcome = server.call(UNAUTHENTICATED).await;
    assert!(matches!(outcome, Err(Error::SessionRequired)), "{outcome:?}");
    assert_eq!(steps(), ["authenticate"]);

    // The budget is taken before the payload is decoded.
    let outcome = server.call(&b"\xff"[..]).await;
    assert!(matches!(outcome, Err(Error::Malformed(_))), "{outcome:?}");
    assert_eq!(steps(), ["authenticate", "budget"]);

    let outcome = server.relay_to(REFUSED).await;
    assert!(matches!(outcome, Err(Error::AdminRequired)), "{outcome:?}");
    assert_eq!(steps(), ["authenticate", "budget", "authorize"]);

    server.relay_to("allowed").await.expect("an allowed request");
    assert_eq!(steps(), ["authenticate", "budget", "authorize", "handle"]);
}

#[tokio::test]
async fn a_request_that_is_not_authorized_consumes_its_budget() {
    let server = TestServer::with_budget(1).await;
    let outcome = server.relay_to(REFUSED).await;
    assert!(matches!(outcome, Err(Error::AdminRequired)), "{outcome:?}");
    steps();
    let outcome = server.relay_to("allowed").await;
    assert!(matches!(outcome, Err(Error::RateLimited(_))), "{outcome:?}");
    assert_eq!(steps(), ["authenticate", "budget"]);
}

#[tokio::test]
async fn the_deadline_includes_the_authorization() {
    let server = TestServer::with_budget(1).await;
    tokio::time::pause();
    let mut call = Box::pin(server.relay_to(PENDING));
    assert!(call.as_mut().now_or_never().is_none());
    tokio::time::advance(Duration::from_millis(29_999)).await;
    assert!(call.as_mut().now_or_never().is_none());
    tokio::time::advance(Duration::from_millis(1)).await;
    let outcome = call.await;
    assert!(matches!(outcome, Err(Error::DeadlineExceeded)), "{outcome:?}");
    assert_eq!(steps(), ["authenticate", "budget", "authorize"]);
}
