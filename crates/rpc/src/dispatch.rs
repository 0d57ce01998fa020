//! The table that maps method ids to handlers, and the steps of every call.
//!
//! A call takes these steps: its size is checked ([`check_size`]) before its payload is read; then
//! authenticate, take its budgets, decode, authorize ([`admit`]); then the handler. The steps
//! before the handler have the method's standard deadline. The deadline of the handler is later by
//! the wait that the request asks for.
//!
//! The table has the rows that `qpq_proto` marks as served. A row without a handler does not
//! compile, nor does a row whose handler requires more of the caller than the row authenticates.
//! Each entry contains all steps of one method, so a call costs one indirection and one allocation:
//! its future. A waiting FetchWait occupies only its future.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{future::BoxFuture, poll};
use prost::Message as _;
use qpq_domain::UnixMillis;
use qpq_ports::Lease;
use qpq_proto::{
    LimitClass, Method, MethodInfo, Status, deadlines::Deadline as _, methods::Enqueue,
};
use tokio::time::{Instant, timeout_at};

use crate::{
    Answer, App, ClientConnection, Error, Subject,
    answers::Reservation,
    auth::{Authenticate, Authorize, Principal as _},
    limits::SubjectKey,
};

/// The maximum size of an Enqueue request without its payload, in bytes, with some space for
/// unknown fields.
const ENQUEUE_OVERHEAD: usize = 1 << 10;

/// The context of a call.
#[derive(Clone, Copy, Debug)]
pub struct Cx<'a> {
    /// The state that all handlers share.
    pub app: &'a Arc<App>,
    /// The connection of the call.
    pub conn: &'a Arc<ClientConnection>,
    /// The time at which the call began.
    pub now: UnixMillis,
}

impl Cx<'_> {
    /// Takes one call from the budget that `class` has for `subject`, if there is one.
    pub async fn limit(self, class: LimitClass, subject: Subject<'_>) -> Result<(), Error> {
        self.app.budgets.take(self, class, subject, 1).await
    }

    /// Takes `cost` from the budgets that `class` has for `subject` and for the connection's
    /// address. `cost` is that of work in addition to the call, which was taken before.
    pub(crate) async fn charge(
        self,
        class: LimitClass,
        subject: Subject<'_>,
        cost: u32,
    ) -> Result<(), Error> {
        if cost == 0 {
            return Ok(());
        }
        let budgets = &self.app.budgets;
        let address = Subject::Ip(self.conn.ip());
        // After the call itself, a budget contains at most its burst minus one.
        let payable = budgets.payable(class, subject, cost);
        // The budget of the subject first, so that a refused call of one subject does not count for
        // others at its address.
        budgets.take(self, class, subject, payable).await?;
        budgets.take(self, class, address, budgets.payable(class, address, cost)).await?;
        self.app.debts.add(class, subject.key(), cost - payable, self.now);
        Ok(())
    }

    /// Takes one call from the budgets of the address and of `subject`. From the latter, also takes
    /// the debt of earlier calls.
    async fn charge_call(
        self,
        class: LimitClass,
        subject: Option<Subject<'_>>,
    ) -> Result<(), Error> {
        let address = Subject::Ip(self.conn.ip());
        let Some(subject) = subject else { return self.limit(class, address).await };
        let owed = self.app.debts.collect(class, subject.key());
        let cost = owed.saturating_add(1);
        let taken = match self.app.budgets.take(self, class, subject, cost).await {
            Ok(()) => self.limit(class, address).await,
            refused => refused,
        };
        if taken.is_err() {
            self.app.debts.add(class, subject.key(), owed, self.now);
        }
        taken
    }
}

/// The caller that the handler of `M` receives.
pub(crate) type CallerOf<M> = <<M as Method>::Auth as Authorize<<M as Method>::Request>>::Caller;

/// The result of the handler of `M`.
pub type Handled<M> = Result<Response<<M as Method>::Response>, Error>;

/// The implementation of a method.
pub trait Handler: Method<Auth: Authorize<<Self as Method>::Request>> {
    /// Executes an authorized request.
    fn handle(
        cx: Cx<'_>,
        caller: CallerOf<Self>,
        request: Self::Request,
    ) -> impl Future<Output = Handled<Self>> + Send;

    /// Returns the maximum size of the answer in bytes, for methods whose answer is large and grows
    /// with the request. That much memory is reserved before the handler is called.
    fn answer_bytes(_request: &Self::Request) -> usize {
        0
    }
}

/// A handler's response, with the lease of the messages in it.
pub struct Response<R> {
    /// The response message.
    pub message: R,
    /// The lease, which is completed once the client has the whole answer, and released otherwise.
    pub lease: Option<Box<dyn Lease>>,
    /// The memory for the response, if the handler reserved it.
    pub memory: Option<Reservation>,
}

impl<R> Response<R> {
    /// Returns a response with the messages of `lease`.
    pub fn with_lease(message: R, lease: Box<dyn Lease>, memory: Reservation) -> Self {
        Self { message, lease: Some(lease), memory: Some(memory) }
    }
}

impl<R: std::fmt::Debug> std::fmt::Debug for Response<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Response").field("message", &self.message).finish_non_exhaustive()
    }
}

impl<R> From<R> for Response<R> {
    fn from(message: R) -> Self {
        Self { message, lease: None, memory: None }
    }
}

type Call = for<'a> fn(Cx<'a>, Bytes) -> BoxFuture<'a, Result<Answer, Error>>;

/// A served method.
pub(crate) struct Entry {
    pub(crate) info: MethodInfo,
    pub(crate) call: Call,
}

macro_rules! table {
    ($($method:path)+) => {
        &[$(Entry { info: <$method as Method>::INFO, call: call::<$method> }),+]
    };
}

/// Every served method, by id.
pub(crate) static TABLE: &[Entry] = qpq_proto::for_each_served_method!(table);

/// Returns the index of a method in [`TABLE`], `None` for one that is not served.
pub(crate) fn row(method: u16) -> Option<usize> {
    TABLE.binary_search_by_key(&method, |entry| entry.info.id).ok()
}

fn call<'a, M: Handler>(cx: Cx<'a>, payload: Bytes) -> BoxFuture<'a, Result<Answer, Error>> {
    Box::pin(serve::<M>(cx, payload))
}

/// Checks the announced size of a request against its row, and that of an Enqueue against the
/// configured maximum of payloads.
pub(crate) fn check_size(app: &App, method: &MethodInfo, payload_len: u32) -> Result<(), Error> {
    if payload_len > method.largest_request.bytes() {
        return Err(Error::TooLarge);
    }
    let configured = app.config.delivery.max_payload.saturating_add(ENQUEUE_OVERHEAD);
    if method.id == Enqueue::INFO.id && payload_len as usize > configured {
        return Err(Error::PayloadTooLarge);
    }
    Ok(())
}

async fn serve<M: Handler>(cx: Cx<'_>, payload: Bytes) -> Result<Answer, Error> {
    let started = Instant::now();
    let standard = started + M::INFO.deadline.duration(Duration::ZERO);
    let Admitted { payer, caller, request } =
        within(standard, pin!(admit::<M>(cx, payload))).await??;
    let deadline = started + M::INFO.deadline.duration(requested_wait::<M>(cx.app, &request));
    let reserved = match M::answer_bytes(&request) {
        0 => None,
        bytes => Some(cx.app.answers.reserve(cx, payer, bytes).await?),
    };
    let response = within(deadline, pin!(M::handle(cx, caller, request))).await??;
    Ok(encode(response, reserved))
}

/// Returns the time that the request asks to wait, within the configured limits.
pub(crate) fn requested_wait<M: Method>(app: &App, request: &M::Request) -> Duration {
    let timeout_ms = M::Deadline::requested_wait(request);
    timeout_ms.map_or(Duration::ZERO, |timeout_ms| app.config.delivery.wait(timeout_ms))
}

/// An authorized request.
struct Admitted<M: Handler> {
    /// The principal, which pays for the call; `None` for an anonymous client.
    payer: Option<SubjectKey>,
    caller: CallerOf<M>,
    request: M::Request,
}

/// Executes the steps before the handler.
async fn admit<M: Handler>(cx: Cx<'_>, payload: Bytes) -> Result<Admitted<M>, Error> {
    let principal = M::Auth::authenticate(cx, &payload).await?;
    let payer = principal.subject().map(Subject::key);
    cx.charge_call(M::INFO.limit, principal.subject()).await?;
    let request = M::Request::decode(payload)?;
    let caller = M::Auth::authorize(cx, principal, &request).await?;
    Ok(Admitted { payer, caller, request })
}

/// Serializes a response. After that the reserved memory belongs to the answer alone.
fn encode<R: prost::Message>(response: Response<R>, reserved: Option<Reservation>) -> Answer {
    let Response { message, mut lease, memory } = response;
    let encoded = message.encode_to_vec();
    drop(message);
    if let Some(lease) = &mut lease {
        lease.free_payloads();
    }
    let payload = match memory.or(reserved) {
        Some(memory) => memory.attach(encoded),
        None => encoded.into(),
    };
    Answer { status: Status::Ok.code(), payload, lease }
}

/// Runs `work` until `deadline`. Work that completes immediately uses no timer.
async fn within<F: Future>(deadline: Instant, mut work: Pin<&mut F>) -> Result<F::Output, Error> {
    match poll!(work.as_mut()) {
        std::task::Poll::Ready(output) => Ok(output),
        std::task::Poll::Pending => {
            timeout_at(deadline, work).await.map_err(|_elapsed| Error::DeadlineExceeded)
        }
    }
}

#[cfg(test)]
mod tests;
