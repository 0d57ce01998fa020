//! Calls with an account's token. The test determines whether an answer arrives or is lost.

use std::{fmt, future::Future, panic::Location, sync::Arc};

use bytes::Bytes;
use prost::Message as _;
use qpq_ports::{Clock, Lease};
use qpq_proto::{Method, Status, methods, session::append_session_token, v1};

use crate::harness::{Refused, Server, User};

/// An Ok answer: the response, and the lease of its messages.
pub(crate) struct OkAnswer<R> {
    pub(crate) response: R,
    pub(crate) lease: Option<Box<dyn Lease>>,
    clock: Arc<dyn Clock>,
}

impl<R> OkAnswer<R> {
    /// Completes the lease, as the transport does once the client has the whole answer.
    pub(crate) async fn arrived(self) -> R {
        if let Some(lease) = self.lease {
            lease.complete(self.clock.now()).await.expect("a store that works");
        }
        self.response
    }
}

impl<R: fmt::Debug> fmt::Debug for OkAnswer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OkAnswer").field("response", &self.response).finish_non_exhaustive()
    }
}

impl Server {
    /// Returns the store id in the form that answers have.
    pub(crate) fn store_id(&self) -> Bytes {
        Bytes::copy_from_slice(self.rpc.app().stores.maintenance.store_id().as_bytes())
    }
}

impl User {
    /// Returns the identity key in the form that requests have.
    pub(crate) fn key(&self) -> Bytes {
        Bytes::copy_from_slice(self.identity.as_bytes())
    }

    /// Opens another connection of the account.
    pub(crate) fn elsewhere(&self, server: &Server) -> Self {
        Self {
            client: server.connect(),
            identity: self.identity,
            signing: self.signing.clone(),
            token: self.token.clone(),
            name: self.name.clone(),
        }
    }

    /// Logs in again on the same connection.
    pub(crate) async fn again(self) -> Self {
        let session = self.client.log_in(&self.name, "password").await.expect("the right password");
        Self { token: session.session_token, ..self }
    }

    /// Calls a method. To lose the answer, drop its lease, as the transport does when the
    /// connection ends before the answer arrives.
    pub(crate) async fn ask<M: Method>(
        &self,
        request: M::Request,
    ) -> Result<OkAnswer<M::Response>, Refused> {
        let mut payload = request.encode_to_vec();
        append_session_token(&mut payload, &self.token);
        let answer = self.client.raw(M::INFO.id, payload).await;
        assert!(answer.payload.len() <= 4 << 20, "an answer of {} bytes", answer.payload.len());
        if answer.status != Status::Ok.code() {
            assert!(answer.lease.is_none(), "a refusal has no messages");
            return Err(Refused::new(&answer));
        }
        let response = M::Response::decode(answer.payload).expect("the method's response");
        let clock = Arc::clone(&self.client.rpc.app().clock);
        Ok(OkAnswer { response, lease: answer.lease, clock })
    }

    /// Returns the response of a call that must succeed. The answer arrives.
    #[track_caller]
    pub(crate) fn ok<M: Method>(&self, request: M::Request) -> impl Future<Output = M::Response> {
        let caller = Location::caller();
        async move {
            match self.ask::<M>(request).await {
                Ok(answer) => answer.arrived().await,
                Err(refused) => panic!("{} at {caller}: {refused:?}", M::INFO.name),
            }
        }
    }

    /// Returns the refusal of a call that must fail.
    #[track_caller]
    pub(crate) fn refused<M: Method>(&self, request: M::Request) -> impl Future<Output = Refused> {
        let caller = Location::caller();
        async move {
            match self.ask::<M>(request).await {
                Ok(_) => panic!("{} at {caller} was answered Ok", M::INFO.name),
                Err(refused) => refused,
            }
        }
    }

    /// Sends a message to `recipient`'s default channel.
    pub(crate) async fn send(
        &self,
        recipient: &Self,
        payload: &'static [u8],
    ) -> v1::EnqueueResponse {
        self.ok::<methods::Enqueue>(message(recipient, payload)).await
    }
}

impl Refused {
    /// Asserts status and code, and that there is a time to wait exactly if the protocol requires
    /// it.
    #[track_caller]
    pub(crate) fn assert(&self, status: Status, code: &str) {
        assert_eq!((self.status, self.code.as_str()), (status, code), "{self:?}");
        let waits = matches!(status, Status::RateLimited | Status::Unavailable);
        assert_eq!(self.retry_after.is_some(), waits, "{self:?}");
    }

    /// Asserts that `field` is refused for its length or value.
    #[track_caller]
    pub(crate) fn assert_field(&self, field: &str) {
        self.assert(Status::BadRequest, "rpc.invalid_field");
        assert_eq!(self.field, field);
    }
}

/// Returns a message to `recipient`'s default channel without other fields.
pub(crate) fn message(recipient: &User, payload: &'static [u8]) -> v1::EnqueueRequest {
    v1::EnqueueRequest {
        recipient_key: recipient.key(),
        payload: Bytes::from_static(payload),
        ..Default::default()
    }
}
