//! From a method id to its handler: the table, and the way of every call through it.
//!
//! The table is made from the rows that `qpq_proto` marks as served: a row without a handler does
//! not compile, nor one whose handler wants a stronger caller. Each entry is the whole way of one
//! method, so a call is one indirection and one allocation: its own future, which for a parked
//! FetchWait is all that stays.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{future::BoxFuture, poll};
use prost::Message as _;
use qpq_domain::{AccountId, UnixMillis};
use qpq_ports::Lease;
use qpq_proto::{LimitClass, Method, MethodInfo};
use tokio::time::{Instant, timeout_at};

use crate::{
    App, Connection, Error, Subject,
    answers::Reservation,
    auth::{Authenticate, Principal as _},
};

/// What surrounds a call.
#[derive(Clone, Copy, Debug)]
pub struct Cx<'a> {
    pub app: &'a Arc<App>,
    pub conn: &'a Arc<Connection>,
    /// When the call began.
    pub now: UnixMillis,
}

impl Cx<'_> {
    /// Takes one call from the budget that `class` keeps for `subject`; nothing if it keeps none by
    /// that.
    pub async fn limit(self, class: LimitClass, subject: Subject<'_>) -> Result<(), Error> {
        self.app.limits.take(self, class, subject, 1).await
    }

    /// Takes `cost` from the budgets that `class` keeps for the account and for the address of its
    /// connection: for work beyond the call, which has been taken already.
    pub(crate) async fn charge(
        self,
        class: LimitClass,
        account: AccountId,
        cost: u32,
    ) -> Result<(), Error> {
        if cost == 0 {
            return Ok(());
        }
        let limits = &self.app.limits;
        let (own, address) = (Subject::Account(account), Subject::Ip(self.conn.ip()));
        // The call has been taken from the same budgets, so they are not full.
        let payable = limits.payable(class, &own, cost);
        // The account first: what it is refused costs others at its address nothing.
        limits.take(self, class, own, payable).await?;
        limits.take(self, class, address, limits.payable(class, &address, cost)).await?;
        self.app.owed.add(class, account, cost - payable, self.now);
        Ok(())
    }

    /// Takes a call of the account, and what earlier reads of it owe.
    async fn charge_call(self, class: LimitClass, account: AccountId) -> Result<(), Error> {
        let owed = self.app.owed.collect(class, account);
        let cost = owed.saturating_add(1);
        let limits = &self.app.limits;
        let taken = match limits.take(self, class, Subject::Account(account), cost).await {
            Ok(()) => limits.take(self, class, Subject::Ip(self.conn.ip()), 1).await,
            refused => refused,
        };
        if taken.is_err() {
            self.app.owed.add(class, account, owed, self.now);
        }
        taken
    }
}

/// Whom a method's handler gets.
pub(crate) type Principal<M> = <<M as Method>::Auth as Authenticate>::Principal;

/// What answers a method.
pub trait Handler: Method<Auth: Authenticate> {
    fn handle(
        cx: Cx<'_>,
        caller: Principal<Self>,
        request: Self::Request,
    ) -> impl Future<Output = Result<Answered<Self::Response>, Error>> + Send;

    /// The most that the answer takes, for methods whose answer is large and grows with the
    /// request. Its memory is reserved before the handler is called.
    fn answer_bytes(_request: &Self::Request) -> usize {
        0
    }

    /// How long the request asks to wait; only methods of the deadline class `Wait` do. Their
    /// deadline lies behind it.
    fn wait(_app: &App, _request: &Self::Request) -> Duration {
        Duration::ZERO
    }
}

/// A handler's response, and what may be waiting for its arrival.
pub struct Answered<R> {
    pub response: R,
    /// Settled once the client has every byte, released otherwise.
    pub lease: Option<Box<dyn Lease>>,
    /// The memory for the response, where the handler reserved it.
    pub memory: Option<Reservation>,
}

impl<R> Answered<R> {
    /// A response that shows what `lease` holds.
    pub fn with_lease(response: R, lease: Box<dyn Lease>, memory: Reservation) -> Self {
        Self { response, lease: Some(lease), memory: Some(memory) }
    }
}

impl<R: std::fmt::Debug> std::fmt::Debug for Answered<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answered").field("response", &self.response).finish_non_exhaustive()
    }
}

impl<R> From<R> for Answered<R> {
    fn from(response: R) -> Self {
        Self { response, lease: None, memory: None }
    }
}

/// A response as bytes.
pub(crate) struct Done {
    pub(crate) payload: Bytes,
    pub(crate) lease: Option<Box<dyn Lease>>,
}

type Call = for<'a> fn(Cx<'a>, Bytes) -> BoxFuture<'a, Result<Done, Error>>;

/// A served method.
pub(crate) struct Entry {
    pub(crate) info: MethodInfo,
    pub(crate) call: Call,
}

macro_rules! table {
    ($($method:path)+) => { &[$(Entry { info: <$method as Method>::INFO, call: call::<$method> }),+] };
}

/// Every served method, by id.
pub(crate) static TABLE: &[Entry] = qpq_proto::for_each_served_method!(table);

/// The place of a method in [`TABLE`]; `None` for one that is not served.
pub(crate) fn row(method: u16) -> Option<usize> {
    TABLE.binary_search_by_key(&method, |entry| entry.info.id).ok()
}

fn call<'a, M: Handler>(cx: Cx<'a>, payload: Bytes) -> BoxFuture<'a, Result<Done, Error>> {
    Box::pin(serve::<M>(cx, payload))
}

async fn serve<M: Handler>(cx: Cx<'_>, payload: Bytes) -> Result<Done, Error> {
    let started = Instant::now();
    let standard = started + M::INFO.deadline.duration(Duration::ZERO);
    let (caller, request) = within(standard, pin!(admit::<M>(cx, payload))).await??;
    let deadline = started + M::INFO.deadline.duration(M::wait(cx.app, &request));
    let reserved = match M::answer_bytes(&request) {
        0 => None,
        bytes => Some(cx.app.answers.reserve(cx, caller.account(), bytes).await?),
    };
    let answered = within(deadline, pin!(M::handle(cx, caller, request))).await??;
    Ok(encode(answered, reserved))
}

/// Encodes the response; from then on its memory is the answer's alone.
fn encode<R: prost::Message>(answered: Answered<R>, reserved: Option<Reservation>) -> Done {
    let Answered { response, mut lease, memory } = answered;
    let encoded = response.encode_to_vec();
    drop(response);
    if let Some(lease) = &mut lease {
        lease.free_payloads();
    }
    let payload = match memory.or(reserved) {
        Some(memory) => memory.attach(encoded),
        None => encoded.into(),
    };
    Done { payload, lease }
}

/// Session, budgets, and the message itself: all that comes before the handler.
async fn admit<M: Handler>(
    cx: Cx<'_>,
    payload: Bytes,
) -> Result<(Principal<M>, M::Request), Error> {
    let caller = M::Auth::authenticate(cx, &payload).await?;
    match caller.account() {
        Some(account) => cx.charge_call(M::INFO.limit, account).await?,
        None => cx.limit(M::INFO.limit, Subject::Ip(cx.conn.ip())).await?,
    }
    Ok((caller, M::Request::decode(payload)?))
}

/// Gives `work` until `deadline`. What answers at once never touches a timer.
async fn within<F: Future>(deadline: Instant, mut work: Pin<&mut F>) -> Result<F::Output, Error> {
    match poll!(work.as_mut()) {
        std::task::Poll::Ready(output) => Ok(output),
        std::task::Poll::Pending => {
            timeout_at(deadline, work).await.map_err(|_elapsed| Error::DeadlineExceeded)
        }
    }
}

#[cfg(test)]
mod tests {
    use qpq_proto::methods::{Enqueue, FetchWait, Health};

    use super::*;

    fn size<'a, F: Future>(_: impl Fn(Cx<'a>, Bytes) -> F) -> usize {
        size_of::<F>()
    }

    /// A parked FetchWait is what an idle client costs, besides its connection.
    #[test]
    fn futures_are_small() {
        let sizes = [size(serve::<Health>), size(serve::<Enqueue>), size(serve::<FetchWait>)];
        assert!(sizes.iter().all(|size| *size <= 2_048), "{sizes:?}");
    }

    #[test]
    fn every_served_method_is_found_by_its_id() {
        for (place, entry) in TABLE.iter().enumerate() {
            assert_eq!(row(entry.info.id), Some(place));
        }
        let served: Vec<_> = qpq_proto::METHODS.iter().filter(|method| method.served).collect();
        assert_eq!(served.len(), TABLE.len());
    }
}
