//! Calls in general: rows, refusals, deadlines, failing stores.

use std::{future::pending, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt as _;
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};
use prost::Message as _;
use qpq_domain::{IdentityKey, UnixMillis, Username};
use qpq_ports::{
    Account, Accounts, Credentials, Deletion, Erasing, ErasureId, NewAccount, PasswordChange,
    PasswordChanged, Registration, StoreError, StoreResult,
};
use qpq_proto::{METHODS, Status, v1::OpaqueLoginStartRequest};
use qpq_rpc::{Answer, Code};
use qpq_wire::Refusal;

use crate::harness::{Refused, Server, code};

#[tokio::test]
async fn calls_of_unserved_methods_are_refused_as_unknown() {
    let server = Server::start().await;
    let client = server.connect();
    let later = METHODS.iter().filter(|method| !method.served).map(|method| method.id);
    for id in later.chain([0, 1, 99, 106, 6, u16::MAX]) {
        let answers = [
            client.raw(id, Bytes::new()).await,
            server.rpc.admit(&client.conn, id, 10).expect_err("unknown"),
        ];
        for answer in answers {
            let refused = Refused::new(&answer);
            assert_eq!(
                (refused.status, refused.code.as_str()),
                (Status::UnknownMethod, "rpc.unknown_method"),
                "{id}"
            );
        }
    }
}

#[tokio::test]
async fn a_request_above_its_rows_size_is_refused_by_its_header() {
    let server = Server::start().await;
    let client = server.connect();
    for method in METHODS.iter().filter(|method| method.served) {
        let largest = method.largest_request.bytes();
        if method.id != 200 {
            server.rpc.admit(&client.conn, method.id, largest).expect("the largest allowed");
        }
        let refused = Refused::new(
            &server.rpc.admit(&client.conn, method.id, largest + 1).expect_err("larger"),
        );
        assert_eq!((refused.status, refused.code.as_str()), (Status::BadRequest, "rpc.too_large"));
    }
}

#[tokio::test]
async fn requests_without_messages_or_lists_are_small() {
    let server = Server::start().await;
    let client = server.connect();
    for method in [102, 104, 201, 202, 203, 206, 301, 303, 305, 500, 501, 802] {
        let refused = server.rpc.admit(&client.conn, method, (8 << 10) + 1).expect_err("larger");
        assert_eq!(Refused::new(&refused).code, "rpc.too_large", "{method}");
    }
}

#[tokio::test]
async fn an_enqueue_above_the_configured_payload_is_refused_by_its_header() {
    let server = Server::with(|config| config.delivery.max_payload = 5_000).await;
    let client = server.connect();
    server.rpc.admit(&client.conn, 200, 5_000 + 1_024).expect("a payload and its overhead");
    let refused = server.rpc.admit(&client.conn, 200, 5_000 + 1_025).expect_err("larger");
    assert_eq!(Refused::new(&refused).code, "delivery.payload_too_large");
}

#[tokio::test]
async fn each_refusal_of_the_transport_has_an_answer() {
    let server = Server::start().await;
    let client = server.connect();
    for (why, status, code) in [
        (Refusal::TooLarge, Status::BadRequest, "rpc.too_large"),
        (Refusal::Malformed, Status::BadRequest, "rpc.malformed_frame"),
        (Refusal::Timeout, Status::DeadlineExceeded, "rpc.slow_request"),
        (Refusal::ClientMemory, Status::RateLimited, "rpc.unfinished_requests"),
        (Refusal::ServerMemory, Status::Unavailable, "rpc.requests_full"),
        (Refusal::Internal, Status::Internal, "rpc.internal"),
    ] {
        for method in [None, Some(802), Some(9)] {
            let refused = Refused::new(&server.rpc.refuse(&client.conn, method, why));
            assert_eq!((refused.status, refused.code.as_str()), (status, code));
        }
    }
}

#[tokio::test]
async fn malformed_payloads_and_missing_sessions_are_refused_by_every_method() {
    let server = Server::start().await;
    let client = server.connect();
    for method in METHODS.iter().filter(|method| method.served) {
        for rubbish in [&b"\xff"[..], b"\x0a\xff\xff\xff\xff\x0f", b"\x7b", &[0; 64]] {
            let answer = client.raw(method.id, Bytes::copy_from_slice(rubbish)).await;
            let refused = Refused::new(&answer);
            assert_eq!(
                (refused.status, refused.code.as_str()),
                (Status::BadRequest, "rpc.malformed"),
                "{method:?}"
            );
        }
        if method.auth != qpq_proto::AuthKind::Anonymous {
            let refused = Refused::new(&client.raw(method.id, Bytes::new()).await);
            assert_eq!(
                (refused.status, refused.code.as_str()),
                (Status::Unauthorized, "auth.session_required")
            );
        }
    }
}

/// Any payload from a client with a session is answered without a failure of the server, and each
/// refusal has a documented code.
#[test]
fn no_payload_causes_a_failure_of_the_server() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (_server, alice) = runtime.block_on(async {
        let server = Server::start().await;
        let alice = server.user("alice").await;
        // During a drain no call waits, so every call of this test ends immediately.
        server.rpc.drain();
        (server, alice)
    });
    let methods: Vec<_> =
        METHODS.iter().filter(|method| method.served && method.name != "Logout").collect();
    // Existing fields with random content reach more code than random bytes.
    let field = (1u8..12, prop_oneof![Just(0u8), Just(2)], vec(any::<u8>(), 0..40)).prop_map(
        |(number, wire_type, bytes)| match wire_type {
            0 => vec![number << 3, bytes.len() as u8],
            _ => [&[number << 3 | 2, bytes.len() as u8][..], &bytes].concat(),
        },
    );
    let payload =
        prop_oneof![vec(field, 0..6).prop_map(|fields| fields.concat()), vec(any::<u8>(), 0..64)];
    let mut runner = TestRunner::new(ProptestConfig::with_cases(2_000));
    runner
        .run(&(select(methods), payload), |(method, payload)| {
            let answer = runtime.block_on(alice.client.raw(method.id, payload));
            let status = Status::from(answer.status);
            prop_assert!(
                !matches!(status, Status::Internal | Status::Unavailable),
                "{method:?}: {answer:?}"
            );
            if status != Status::Ok {
                let code = Refused::new(&answer).code;
                prop_assert!(
                    Code::ALL
                        .iter()
                        .any(|known| known.as_str() == code && known.status() == status)
                );
            }
            Ok(())
        })
        .expect("an answer to everything");
}

type StoreFailure = fn() -> StoreError;

/// An accounts port that fails in one way.
enum FailingAccounts {
    Never,
    Error(StoreFailure),
    /// Returns a record that does not parse.
    Rubbish,
}

impl FailingAccounts {
    async fn answer<T>(&self) -> StoreResult<T> {
        match self {
            Self::Error(error) => Err(error()),
            _ => pending().await,
        }
    }
}

#[async_trait]
impl Accounts for FailingAccounts {
    async fn register(&self, _: NewAccount) -> StoreResult<Registration> {
        self.answer().await
    }

    async fn credentials(&self, _: &Username) -> StoreResult<Option<Credentials>> {
        if let Self::Rubbish = self {
            return Ok(Some(Credentials {
                account: qpq_domain::AccountId(1),
                identity: IdentityKey::new([1; 32]),
                opaque_record: vec![0; 192],
            }));
        }
        self.answer().await
    }

    async fn change_password(&self, _: PasswordChange) -> StoreResult<PasswordChanged> {
        self.answer().await
    }

    async fn by_username(&self, _: &Username) -> StoreResult<Option<Account>> {
        self.answer().await
    }

    async fn by_identity(&self, _: &IdentityKey) -> StoreResult<Option<Account>> {
        self.answer().await
    }

    async fn delete(&self, _: qpq_domain::AccountId, _: UnixMillis) -> StoreResult<Deletion> {
        self.answer().await
    }

    async fn erase(&self, _: ErasureId, _: UnixMillis) -> StoreResult<Erasing> {
        self.answer().await
    }
}

async fn with_accounts(accounts: FailingAccounts) -> Server {
    Server::with_stores(
        |_| {},
        |mut stores| {
            stores.accounts = Arc::new(accounts);
            stores
        },
    )
    .await
}

#[tokio::test]
async fn the_answer_to_a_store_failure_has_its_meaning_and_not_its_cause() {
    let cases: [(StoreFailure, Status, &str); 3] = [
        (|| StoreError::unavailable("SECRET"), Status::Unavailable, "rpc.unavailable"),
        (|| StoreError::conflict("SECRET"), Status::Unavailable, "rpc.conflict"),
        (|| StoreError::corrupt("SECRET"), Status::Internal, "rpc.internal"),
    ];
    for (error, status, expected) in cases {
        let server = with_accounts(FailingAccounts::Error(error)).await;
        let client = server.connect();
        let refused = client.start_login("alice", "password").await.err().expect("a failing store");
        assert_eq!((refused.status, refused.code.as_str()), (status, expected));
        assert_eq!(refused.retry_after.is_some(), status == Status::Unavailable);
        let request = OpaqueLoginStartRequest { username: "alice".into(), request: ke1() };
        let answer = client.raw(102, request.encode_to_vec()).await;
        assert!(!String::from_utf8_lossy(&answer.payload).contains("SECRET"));
    }
    let server = with_accounts(FailingAccounts::Rubbish).await;
    let refused = server.connect().start_login("alice", "password").await;
    assert_eq!(code(refused.map(|_| ())), (Status::Internal, "rpc.internal".into()));
}

/// Returns a well-formed KE1: two valid points around a nonce.
fn ke1() -> Bytes {
    let point = hex::decode("e2f2ae0a6abc4e71a884a961c500515f58e30b6aa582dd8db6a65945e08d2d76")
        .expect("hex");
    [&point[..], &[1; 32], &point].concat().into()
}

#[tokio::test]
async fn a_call_fails_exactly_at_its_deadline() {
    let server = with_accounts(FailingAccounts::Never).await;
    let client = server.connect();
    tokio::time::pause();
    let request = OpaqueLoginStartRequest { username: "alice".into(), request: ke1() };
    let mut call = Box::pin(client.raw(102, request.encode_to_vec()));
    assert!(call.as_mut().now_or_never().is_none());
    tokio::time::advance(Duration::from_millis(29_999)).await;
    assert!(call.as_mut().now_or_never().is_none());
    tokio::time::advance(Duration::from_millis(1)).await;
    let answer: Answer = call.await;
    let refused = Refused::new(&answer);
    assert_eq!((refused.status, refused.code.as_str()), (Status::DeadlineExceeded, "rpc.deadline"));
}

#[test]
fn the_table_of_errors_follows_the_protocol() {
    let mut codes = std::collections::HashSet::new();
    for code in Code::ALL {
        assert!(codes.insert(code.as_str()), "{code:?} has the code of another row");
        assert!(
            code.status() != Status::Ok && !matches!(code.status(), Status::Unknown(_)),
            "{code:?}"
        );
        let shape = |c: char| c.is_ascii_lowercase() || c == '_' || c == '.';
        assert!(
            code.as_str().chars().all(shape) && code.as_str().matches('.').count() == 1,
            "{code:?}"
        );
        assert!(code.message().ends_with('.'), "{code:?}");
    }
}

#[test]
fn the_documented_errors_are_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/errors.md");
    let current = qpq_rpc::docs::errors_md();
    if std::env::var_os("QPQ_UPDATE_DOCS").is_some() {
        std::fs::write(path, &current).expect("docs/ is writable");
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == current,
        "docs/errors.md is stale: QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-rpc"
    );
}
