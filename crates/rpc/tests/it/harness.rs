//! A complete server in a temporary directory, and clients that call its methods by type, as real
//! clients do.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use ed25519_dalek::{Signer as _, SigningKey};
use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialResponse, RegistrationResponse, ksf::Identity,
};
use prost::Message as _;
use qpq_domain::{IdentityKey, InviteCode, StoreLimits, UnixMillis, Username};
use qpq_ports::{Clock, NewInvite, Stores};
use qpq_proto::{
    Method, Status,
    methods::{OpaqueLoginFinish, OpaqueLoginStart, OpaqueRegisterFinish, OpaqueRegisterStart},
    session::append_session_token,
    v1::{
        ErrorDetail, OpaqueLoginFinishRequest, OpaqueLoginFinishResponse, OpaqueLoginStartRequest,
        OpaqueRegisterFinishRequest, OpaqueRegisterStartRequest,
    },
};
use qpq_rpc::{
    Answer, AtRestKeys, ClientConnection, Config, DeliverySigner, Events, OpaqueServer, Parts,
    RateLimits, Rpc, opaque::QpqSuite,
};
use qpq_store_embedded::EmbeddedStore;
use rand::rngs::OsRng;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// The start time of every test: long after the epoch, so that a test can also set the clock back.
pub(crate) const START: UnixMillis = UnixMillis(1_800_000_000_000);

/// The suite of the real client without key stretching, which the server does not observe.
pub(crate) struct ClientSuite;

impl CipherSuite for ClientSuite {
    type OprfCs = <QpqSuite as CipherSuite>::OprfCs;
    type KeyExchange = <QpqSuite as CipherSuite>::KeyExchange;
    type Ksf = Identity;
}

/// A clock that the test advances.
#[derive(Debug)]
pub(crate) struct TestClock(AtomicU64);

impl TestClock {
    pub(crate) fn advance(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_millis()).expect("a test's time"), Ordering::SeqCst);
    }

    pub(crate) fn set(&self, to: UnixMillis) {
        self.0.store(to.0, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::SeqCst))
    }
}

/// A server with its clock and store.
pub(crate) struct Server {
    pub(crate) rpc: Arc<Rpc>,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) store: EmbeddedStore,
    opaque_setup: Vec<u8>,
    pub(crate) at_rest_keys: Vec<u8>,
    dir: TempDir,
}

impl Server {
    /// Starts a server with the default configuration without rate limits.
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// Starts a server with a changed configuration.
    pub(crate) async fn with(configure: impl FnOnce(&mut Config)) -> Self {
        Self::with_stores(configure, |stores| stores).await
    }

    /// Starts a server whose ports are wrapped or replaced.
    pub(crate) async fn with_stores(
        configure: impl FnOnce(&mut Config),
        wrap: impl FnOnce(Stores) -> Stores,
    ) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let mut config = Config {
            domain: "example.org".into(),
            limits: RateLimits { enabled: false, ..RateLimits::default() },
            ..Config::default()
        };
        configure(&mut config);
        let limits = StoreLimits {
            delivery: config.delivery,
            key_packages: config.key_packages,
            ..StoreLimits::default()
        };
        let store = EmbeddedStore::open(dir.path(), limits).await.expect("an empty directory");
        let clock = Arc::new(TestClock(AtomicU64::new(START.0)));
        let opaque = OpaqueServer::generate(&mut OsRng);
        let opaque_setup = opaque.serialize().to_vec();
        let at_rest_keys = AtRestKeys::generate(&mut OsRng).to_vec();
        let rpc = Rpc::new(Parts {
            stores: wrap(store.stores()),
            clock: Arc::clone(&clock) as Arc<dyn Clock>,
            opaque,
            signer: DeliverySigner::generate(&mut OsRng),
            at_rest: AtRestKeys::parse(&at_rest_keys).expect("valid keys"),
            config,
            draining: CancellationToken::new(),
        });
        Self { rpc, clock, store, opaque_setup, at_rest_keys, dir }
    }

    /// Connects to another server on the same store with another configuration.
    pub(crate) fn reconfigured(&self, config: Config) -> Client {
        let rpc = Rpc::new(Parts {
            stores: self.store.stores(),
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
            opaque: OpaqueServer::parse(&self.opaque_setup).expect("the same setup"),
            signer: DeliverySigner::generate(&mut OsRng),
            at_rest: AtRestKeys::parse(&self.at_rest_keys).expect("valid keys"),
            config,
            draining: CancellationToken::new(),
        });
        let conn = rpc.connected((Ipv4Addr::LOCALHOST, 4433).into(), Arc::new(DiscardedEvents));
        Client { rpc, conn }
    }

    /// Makes the store accept the time of the test's clock after a jump of any length.
    pub(crate) async fn believe_clock(&self) {
        let now = self.clock.now();
        qpq_store_embedded::accept_clock(self.dir.path(), now).await.expect("accepted");
        self.store.stores().maintenance.sweep(now).await.expect("a sweep reads the acceptance");
    }

    /// Opens a connection.
    pub(crate) fn connect(&self) -> Client {
        self.connect_from((Ipv4Addr::LOCALHOST, 4433).into())
    }

    pub(crate) fn connect_from(&self, addr: SocketAddr) -> Client {
        Client {
            rpc: Arc::clone(&self.rpc),
            conn: self.rpc.connected(addr, Arc::new(DiscardedEvents)),
        }
    }

    /// Opens a connection with a receiver of its events.
    pub(crate) fn connect_with(&self, events: Arc<dyn Events>) -> Client {
        let conn = self.rpc.connected((Ipv4Addr::LOCALHOST, 4433).into(), events);
        Client { rpc: Arc::clone(&self.rpc), conn }
    }

    /// Registers an account and logs in on a new connection.
    pub(crate) async fn user(&self, name: &str) -> User {
        self.invited(name, "").await
    }

    /// Registers an account whose username the configuration lists as that of an administrator.
    pub(crate) async fn admin(&self, name: &str) -> User {
        let code = InviteCode::from_random(rand::random());
        let invite = NewInvite {
            code: code.hash(),
            uses: 1,
            lifetime: Duration::from_secs(60),
            username: Some(Username::parse(name).expect("a username")),
            note: String::new(),
            now: self.clock.now(),
        };
        self.rpc.app().stores.invites.create(invite).await.expect("create");
        self.invited(name, &code.expose()).await
    }

    async fn invited(&self, name: &str, invite: &str) -> User {
        let client = self.connect();
        let signing = SigningKey::generate(&mut OsRng);
        let identity = IdentityKey::new(signing.verifying_key().to_bytes());
        let upload = client.upload(name, "password").await.expect("an answer");
        let invite = invite.to_owned();
        let request =
            OpaqueRegisterFinishRequest { invite, ..registration(name, &upload, &identity) };
        client.call::<OpaqueRegisterFinish>(request).await.expect("a free name");
        let session = client.log_in(name, "password").await.expect("the right password");
        User { client, identity, signing, token: session.session_token, name: name.into() }
    }
}

/// An account with a connection that is logged in.
pub(crate) struct User {
    pub(crate) client: Client,
    pub(crate) identity: IdentityKey,
    pub(crate) signing: SigningKey,
    pub(crate) token: Bytes,
    pub(crate) name: String,
}

/// Discards all events.
struct DiscardedEvents;

impl Events for DiscardedEvents {
    fn send(&self, _event_type: u16, _payload: Bytes) -> bool {
        true
    }
}

/// A client's connection.
pub(crate) struct Client {
    pub(crate) rpc: Arc<Rpc>,
    pub(crate) conn: Arc<ClientConnection>,
}

/// The refusal that a client receives.
#[derive(Debug, PartialEq)]
pub(crate) struct Refused {
    pub(crate) status: Status,
    pub(crate) code: String,
    pub(crate) field: String,
    pub(crate) retry_after: Option<Duration>,
}

impl Refused {
    pub(crate) fn new(answer: &Answer) -> Self {
        let detail = ErrorDetail::from_payload(&answer.payload);
        Self {
            status: Status::from(answer.status),
            field: detail.field.clone(),
            retry_after: detail.retry_after(),
            code: detail.code,
        }
    }
}

impl Client {
    /// Calls a method by its id and returns the answer.
    pub(crate) async fn raw(&self, method: u16, payload: impl Into<Bytes>) -> Answer {
        self.rpc.call(&self.conn, method, payload.into()).await
    }

    /// Calls a method. A lease is released, as if the answer did not arrive.
    pub(crate) async fn call<M: Method>(
        &self,
        request: M::Request,
    ) -> Result<M::Response, Refused> {
        self.call_with::<M>(request, &[]).await
    }

    /// Calls a method with a session token; none if it is empty.
    pub(crate) async fn call_with<M: Method>(
        &self,
        request: M::Request,
        token: &[u8],
    ) -> Result<M::Response, Refused> {
        let mut payload = request.encode_to_vec();
        if !token.is_empty() {
            append_session_token(&mut payload, token);
        }
        let answer = self.raw(M::INFO.id, payload).await;
        if answer.status == Status::Ok.code() {
            Ok(M::Response::decode(answer.payload).expect("the method's response"))
        } else {
            Err(Refused::new(&answer))
        }
    }

    /// Calls OpaqueRegisterStart and returns the upload for OpaqueRegisterFinish.
    pub(crate) async fn upload(&self, name: &str, password: &str) -> Result<Vec<u8>, Refused> {
        let started = ClientRegistration::<ClientSuite>::start(&mut OsRng, password.as_bytes())
            .expect("blinded");
        let request = OpaqueRegisterStartRequest {
            username: name.into(),
            request: started.message.serialize().to_vec().into(),
        };
        let response = self.call::<OpaqueRegisterStart>(request).await?;
        let response = RegistrationResponse::deserialize(&response.response).expect("a response");
        let parameters = ClientRegistrationFinishParameters::default();
        let finished = started
            .state
            .finish(&mut OsRng, password.as_bytes(), response, parameters)
            .expect("an upload");
        Ok(finished.message.serialize().to_vec())
    }

    pub(crate) async fn register(
        &self,
        name: &str,
        password: &str,
        identity: &IdentityKey,
    ) -> Result<(), Refused> {
        let upload = self.upload(name, password).await?;
        self.call::<OpaqueRegisterFinish>(registration(name, &upload, identity)).await.map(drop)
    }

    /// Calls OpaqueLoginStart.
    pub(crate) async fn start_login(
        &self,
        name: &str,
        password: &str,
    ) -> Result<StartedLogin, Refused> {
        let started =
            ClientLogin::<ClientSuite>::start(&mut OsRng, password.as_bytes()).expect("blinded");
        let request = OpaqueLoginStartRequest {
            username: name.into(),
            request: started.message.serialize().to_vec().into(),
        };
        let ke2 = self.call::<OpaqueLoginStart>(request).await?.response;
        Ok(StartedLogin { state: started.state, ke2, password: password.into(), name: name.into() })
    }

    pub(crate) async fn log_in(
        &self,
        name: &str,
        password: &str,
    ) -> Result<OpaqueLoginFinishResponse, Refused> {
        let finish = self.start_login(name, password).await?.finish();
        self.call::<OpaqueLoginFinish>(finish).await
    }
}

/// A login between OpaqueLoginStart and OpaqueLoginFinish.
pub(crate) struct StartedLogin {
    state: ClientLogin<ClientSuite>,
    pub ke2: Bytes,
    password: String,
    name: String,
}

impl StartedLogin {
    /// Returns the request of OpaqueLoginFinish. After a wrong password or a simulated KE2, a real
    /// client stops. This client sends an invalid finalization, as an attacker would.
    pub(crate) fn finish(self) -> OpaqueLoginFinishRequest {
        let ke2 = CredentialResponse::deserialize(&self.ke2).expect("KE2");
        let parameters = ClientLoginFinishParameters::default();
        let ke3 = self.state.finish(&mut OsRng, self.password.as_bytes(), ke2, parameters);
        let finalization = ke3.map_or_else(|_| vec![7; 64], |ke3| ke3.message.serialize().to_vec());
        OpaqueLoginFinishRequest {
            username: self.name,
            finalization: finalization.into(),
            ..Default::default()
        }
    }
}

/// Returns the request of OpaqueRegisterFinish, without an identity proof.
pub(crate) fn registration(
    name: &str,
    upload: &[u8],
    identity: &IdentityKey,
) -> OpaqueRegisterFinishRequest {
    OpaqueRegisterFinishRequest {
        username: name.into(),
        upload: upload.to_vec().into(),
        identity_key: identity.as_bytes().to_vec().into(),
        ..Default::default()
    }
}

/// Returns the identity proof of this registration.
pub(crate) fn identity_proof(signing: &SigningKey, name: &str, upload: &[u8]) -> Bytes {
    let username = Username::parse(name).expect("a name");
    let message = IdentityKey::registration_message(&username, upload);
    signing.sign(&message).to_bytes().to_vec().into()
}

pub(crate) fn new_identity() -> IdentityKey {
    IdentityKey::new(SigningKey::generate(&mut OsRng).verifying_key().to_bytes())
}

/// Returns the status and code of a refusal.
pub(crate) fn code<T: std::fmt::Debug>(outcome: Result<T, Refused>) -> (Status, String) {
    let refused = outcome.expect_err("a refusal");
    (refused.status, refused.code)
}
