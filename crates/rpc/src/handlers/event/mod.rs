//! Subscribe (206): a task that sends events to the client, so that it need not poll.
//!
//! Events are hints. A Wake reports a new message without its content; the client then peeks and
//! acks, or fetches. While a client receives events more slowly than messages arrive, only the
//! newest Wake of each channel is kept, for a bounded number of channels. A Wake may be repeated,
//! or report a message that was removed in the meantime: a read without a result costs less than a
//! missed message. A connection has at most one subscription; a new one replaces it, and reports
//! the messages in the inbox again.

mod outbox;

use std::{
    ops::ControlFlow,
    sync::{Arc, Weak},
    time::Duration,
};

use qpq_domain::{ChannelId, Seq};
use qpq_ports::{
    PackageOwner, Page, PageLimit, ReadError, ReadQuery, Reader, Stock, StoreResult, View, Wake,
};
use qpq_proto::{methods, v1};
use rand::{Rng as _, rngs::OsRng};
use tokio::time::{Instant, sleep_until};

use self::outbox::{Outbox, Outgoing};
use crate::{
    App, Caller, ClientConnection, Cx, Error, Handled, Handler,
    account_events::{AccountEvent, AccountEventListener},
    app::DrainObserver,
    auth,
};

/// The number of KeyPackages below which KeyPackagesLow is sent.
const LOW_STOCK: u32 = 10;

/// The minimum time between two KeyPackagesLow on one connection.
const LOW_STOCK_INTERVAL: Duration = Duration::from_secs(60);

/// The time to the next attempt when the client accepts no more events or the store fails.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The time between two checks whether the session has expired. A revocation is reported earlier,
/// by an account event.
const RECHECK_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// The time over which the events of a drain are spread, so that not all clients reconnect
/// simultaneously (protocol §5).
const DRAIN_SPREAD: Duration = Duration::from_secs(5);

/// The time from the start of a drain to the latest closing of connections (protocol §5).
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// The limit of one read of the inbox. The read uses only seqs and channels, but returns whole
/// messages.
const LOOK_LIMIT: PageLimit = PageLimit { messages: 256, bytes: 256 << 10 };

/// The limit for one message of any size.
const FIRST_MESSAGE: PageLimit = PageLimit { messages: 1, bytes: 0 };

impl Handler for methods::Subscribe {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::SubscribeRequest) -> Handled<Self> {
        let view = if request.all_channels { View::All } else { View::Channel(ChannelId::DEFAULT) };
        let subscription = Box::new(Subscription::new(cx, caller, view));
        // From now on the subscription receives revocations. This check covers earlier ones.
        auth::recheck(cx, &subscription.caller).await?;
        let task = cx.app.tasks.spawn(subscription.run());
        cx.conn.subscribe(task.abort_handle());
        Ok(v1::SubscribeResponse { success: true }.into())
    }
}

struct Subscription {
    app: Arc<App>,
    /// A weak reference, because the connection owns the task, and aborts it when it closes.
    conn: Weak<ClientConnection>,
    caller: Caller,
    query: ReadQuery,
    wake: Box<dyn Wake>,
    account_events: AccountEventListener,
    /// Dropped after Draining is sent: the drain waits for that.
    drain: Option<DrainObserver>,
    /// The highest seq that was reported.
    reported: Seq,
    /// The latest time at which the connection is closed; `None` before a drain.
    closing_at: Option<Instant>,
    session_ended: bool,
    /// The earliest time for another KeyPackagesLow.
    low_allowed: Instant,
    due: Due,
    outbox: Outbox,
}

/// The times of the next actions; `None` for actions that are not planned.
struct Due {
    look: Option<Instant>,
    recheck: Option<Instant>,
    count_packages: Option<Instant>,
    draining: Option<Instant>,
    flush: Option<Instant>,
}

impl Subscription {
    fn new(cx: Cx<'_>, caller: Caller, view: View) -> Self {
        let now = Instant::now();
        let reader = Reader { inbox: caller.identity, device: caller.device };
        let query = ReadQuery { reader, view };
        Self {
            app: Arc::clone(cx.app),
            conn: Arc::downgrade(cx.conn),
            wake: cx.app.stores.wakes.subscribe(&query),
            query,
            account_events: cx.app.account_events.listen(&caller.identity),
            drain: Some(cx.app.observe_drain()),
            caller,
            reported: Seq::ZERO,
            closing_at: None,
            session_ended: false,
            low_allowed: now,
            due: Due {
                look: Some(now),
                recheck: Some(now + RECHECK_INTERVAL),
                count_packages: None,
                draining: None,
                flush: None,
            },
            outbox: Outbox::default(),
        }
    }

    /// Runs until the session or the connection ends.
    async fn run(mut self: Box<Self>) {
        while let ControlFlow::Continue(()) = self.act().await {
            self.wait().await;
        }
    }

    /// Waits for an event or the next planned action.
    async fn wait(&mut self) {
        let next = self.due.next(self.outbox.has_space());
        let drain = self.drain.as_ref().filter(|_| self.closing_at.is_none());
        tokio::select! {
            biased;
            event = self.account_events.next() => match event {
                AccountEvent::SessionsEnded => self.due.recheck = Some(Instant::now()),
                AccountEvent::KeyPackageTaken => self.due.count_packages = Some(self.low_allowed),
                AccountEvent::DevicesChanged => {
                    self.outbox.push(Outgoing::DevicesChanged);
                    // The session may now read the inbox at another position.
                    self.reported = Seq::ZERO;
                    self.due.look = Some(Instant::now());
                }
            },
            () = began(drain) => {
                let now = Instant::now();
                self.due.draining = Some(now + OsRng.gen_range(Duration::ZERO..DRAIN_SPREAD));
                self.closing_at = Some(now + DRAIN_DEADLINE);
            }
            () = self.wake.woken() => self.due.look = Some(Instant::now()),
            () = sleep_until(next) => {}
        }
    }

    /// Executes the actions that are due and sends the resulting events.
    async fn act(&mut self) -> ControlFlow<()> {
        let Some(conn) = self.conn.upgrade() else { return ControlFlow::Break(()) };
        let now = Instant::now();
        if take_due(&mut self.due.recheck, now) {
            self.recheck(&conn, now).await;
        }
        if self.outbox.has_space() && take_due(&mut self.due.look, now) && !self.session_ended {
            self.look(now).await;
        }
        if take_due(&mut self.due.count_packages, now) {
            self.count_packages(now).await;
        }
        if take_due(&mut self.due.draining, now)
            && let Some(closing_at) = self.closing_at
        {
            self.outbox.push(Outgoing::Draining { closing_at });
        }
        self.flush(&conn, now)
    }

    async fn recheck(&mut self, conn: &Arc<ClientConnection>, now: Instant) {
        let cx = Cx { app: &self.app, conn, now: self.app.clock.now() };
        self.due.recheck = match auth::recheck(cx, &self.caller).await {
            Ok(()) => Some(now + RECHECK_INTERVAL),
            Err(Error::SessionExpired) => {
                self.session_ended = true;
                self.outbox.push(Outgoing::SessionRevoked);
                None
            }
            Err(_) => Some(now + RETRY_DELAY),
        };
    }

    /// Reports new messages. Without new ones, reports the first message again, because another
    /// reader may have leased and released it.
    async fn look(&mut self, now: Instant) {
        let looked = match self.peek(self.reported, LOOK_LIMIT).await {
            Ok(page) if page.envelopes.is_empty() && self.reported > Seq::ZERO => {
                self.peek(Seq::ZERO, FIRST_MESSAGE).await
            }
            other => other,
        };
        let page = match looked {
            Ok(page) => page,
            // The session cannot read the inbox until its device is registered.
            Err(ReadError::DeviceRequired) => return,
            // The client learns from a read that its device lost its position. A Wake causes that
            // read.
            Err(ReadError::PositionLost) => {
                let channel = ChannelId::DEFAULT;
                self.outbox.push(Outgoing::Wake { channel, seq: Seq::ZERO });
                return;
            }
            Err(ReadError::Store(error)) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "peeking for a subscription failed, retrying"
                );
                self.due.look = Some(now + RETRY_DELAY);
                return;
            }
        };
        let has_new = page.envelopes.last().is_some_and(|last| last.seq > self.reported);
        for envelope in &page.envelopes {
            self.outbox.push(Outgoing::Wake { channel: envelope.channel, seq: envelope.seq });
            self.reported = envelope.seq.max(self.reported);
        }
        if has_new && page.more {
            self.due.look = Some(now);
        }
    }

    async fn peek(&self, after: Seq, limit: PageLimit) -> Result<Page, ReadError> {
        self.app.stores.inboxes.peek(self.query, after, limit, self.app.clock.now()).await
    }

    async fn count_packages(&mut self, now: Instant) {
        match self.stock().await {
            Ok(stock) if stock.available < LOW_STOCK => {
                self.outbox.push(Outgoing::KeyPackagesLow { available: stock.available });
            }
            Ok(_) => {}
            Err(_) => self.due.count_packages = Some(now + RETRY_DELAY),
        }
    }

    /// Returns the remaining KeyPackages of the session's device, or of the account if the device
    /// is not registered.
    async fn stock(&self) -> StoreResult<Stock> {
        let Caller { account, device, .. } = self.caller;
        let stores = &self.app.stores;
        let devices = stores.devices.list(account).await?;
        let device = device.filter(|id| devices.iter().any(|device| device.id == *id));
        stores.key_packages.stock(PackageOwner { account, device }, self.app.clock.now()).await
    }

    /// Sends the events of the outbox until the client accepts no more.
    fn flush(&mut self, conn: &ClientConnection, now: Instant) -> ControlFlow<()> {
        self.due.flush = None;
        while let Some(outgoing) = self.outbox.pop() {
            let event = outgoing.event(now);
            if !conn.events().send(event.event_type().code(), event.payload()) {
                self.outbox.push(outgoing);
                self.due.flush = Some(now + RETRY_DELAY);
                break;
            }
            match outgoing {
                Outgoing::SessionRevoked => return ControlFlow::Break(()),
                Outgoing::Draining { .. } => self.drain = None,
                Outgoing::KeyPackagesLow { .. } => self.low_allowed = now + LOW_STOCK_INTERVAL,
                Outgoing::DevicesChanged | Outgoing::Wake { .. } => {}
            }
        }
        ControlFlow::Continue(())
    }
}

impl Due {
    /// Returns the time of the next action. One is always planned: `recheck` until the session
    /// ends, and then `flush`.
    fn next(&self, outbox_has_space: bool) -> Instant {
        // Without space, the next read waits for the flush that makes space for its events.
        let look = self.look.filter(|_| outbox_has_space);
        let all = [look, self.recheck, self.count_packages, self.draining, self.flush];
        all.into_iter().flatten().min().expect("a recheck or a flush is planned")
    }
}

/// Completes when the server begins to drain; never for `None`.
async fn began(drain: Option<&DrainObserver>) {
    match drain {
        Some(drain) => drain.began().await,
        None => std::future::pending().await,
    }
}

/// Returns whether an action is due. If so, removes it from the plan.
fn take_due(due: &mut Option<Instant>, now: Instant) -> bool {
    due.take_if(|due| *due <= now).is_some()
}
