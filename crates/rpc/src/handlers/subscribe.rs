//! 206 Subscribe: a task beside the connection that tells the client, by events, what it would
//! otherwise poll for.
//!
//! The events are hints. A Wake says that a message became visible and carries none of it: the
//! client peeks and acks, or fetches. When the client is slower than its inbox, only the newest
//! Wake of each channel is kept for it, of a bounded number of channels; the inbox itself remembers
//! the rest. A Wake may come twice, or for what has gone meanwhile: it is cheaper to look in vain
//! than to miss something. One connection has at most one subscription; a new one takes the place
//! of the old, and announces again what is in the inbox.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use qpq_domain::{ChannelId, Seq};
use qpq_ports::{Page, PageLimit, ReadQuery, Reader, StoreResult, View, Wake};
use qpq_proto::{
    Event, methods,
    v1::{self, DrainingEvent, KeyPackagesLowEvent, SessionRevokedEvent, WakeEvent},
};
use rand::{Rng as _, rngs::OsRng};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    Answered, App, Caller, Connection, Cx, Error, Handler,
    account_events::{AccountEvent, Listener},
    app::drain_began,
    auth,
};

/// Fewer KeyPackages than this are too few.
const LOW: u32 = 10;

/// Between two KeyPackagesLow on one connection.
const LOW_AT_MOST_EVERY: Duration = Duration::from_secs(60);

/// Between two tries where the client takes no more events, or the store fails.
const RETRY: Duration = Duration::from_secs(1);

/// How often a subscription looks whether its session has expired. (That it was revoked, it is
/// told.)
const RECHECK_EVERY: Duration = Duration::from_secs(10 * 60);

/// Over how long a drain's events are spread, so that clients do not all reconnect at once
/// (protocol §5).
const DRAIN_SPREAD: Duration = Duration::from_secs(5);

/// The one reason in SessionRevoked: a client is not told which, and logs in again.
const SESSION_ENDED: &str = "session_ended";

/// How long after the beginning of a drain connections are closed at the latest (protocol §5).
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// What one look at the inbox reads: it only wants seqs and channels, but gets the messages too.
const LOOK: PageLimit = PageLimit { messages: 256, bytes: 256 << 10 };

/// Channels whose Wakes may wait for the client. With as many, the inbox is not looked at until the
/// client has accepted some.
const MAX_WAKES: usize = 256;

/// One message, whatever its size.
const FIRST: PageLimit = PageLimit { messages: 1, bytes: 0 };

impl Handler for methods::Subscribe {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::SubscribeRequest,
    ) -> Result<Answered<v1::SubscribeResponse>, Error> {
        let view = if request.all_channels { View::All } else { View::Channel(ChannelId::DEFAULT) };
        let subscription = Box::new(Subscription::new(cx, caller, view));
        // It listens by now; what was revoked before that is seen here.
        auth::recheck(cx, &subscription.caller).await?;
        let task = tokio::spawn(subscription.run());
        cx.conn.subscribe(task.abort_handle());
        Ok(v1::SubscribeResponse { success: true }.into())
    }
}

struct Subscription {
    app: Arc<App>,
    /// The connection owns the task, not the other way round.
    conn: Weak<Connection>,
    caller: Caller,
    read: ReadQuery,
    wake: Box<dyn Wake>,
    account_events: Listener,
    /// Held until the client was told of the drain: the drain waits for that.
    draining: Option<watch::Receiver<bool>>,
    /// Up to which seq the inbox was looked at.
    seen: Seq,
    /// Once a drain began: when the connection will be closed at the latest.
    closing_at: Option<Instant>,
    /// The first moment for another KeyPackagesLow.
    low_allowed: Instant,
    due: Due,
    outbox: Outbox,
}

/// When to do what; `None` for not at all.
struct Due {
    look: Option<Instant>,
    recheck: Option<Instant>,
    count_packages: Option<Instant>,
    tell_of_drain: Option<Instant>,
    flush: Option<Instant>,
}

/// What the client is still to be told.
#[derive(Default)]
struct Outbox {
    session_ended: bool,
    /// When the drain will have closed the connection at the latest.
    closing_at: Option<Instant>,
    packages_low: Option<u32>,
    /// The newest seq of each channel.
    wakes: BTreeMap<ChannelId, Seq>,
}

impl Subscription {
    fn new(cx: Cx<'_>, caller: Caller, view: View) -> Self {
        let now = Instant::now();
        let reader = Reader { inbox: caller.identity, device: caller.device };
        let read = ReadQuery { reader, view };
        Self {
            app: Arc::clone(cx.app),
            conn: Arc::downgrade(cx.conn),
            wake: cx.app.stores.wakes.subscribe(&read),
            read,
            account_events: cx.app.account_events.listen(&caller.identity),
            draining: Some(cx.app.draining()),
            caller,
            seen: Seq::ZERO,
            closing_at: None,
            low_allowed: now,
            due: Due {
                look: Some(now),
                recheck: Some(now + RECHECK_EVERY),
                count_packages: None,
                tell_of_drain: None,
                flush: None,
            },
            outbox: Outbox::default(),
        }
    }

    /// Until the session or the connection ends.
    async fn run(mut self: Box<Self>) {
        while let ControlFlow::Continue(()) = self.act().await {
            self.wait().await;
        }
    }

    /// Waits until something happened or is due.
    async fn wait(&mut self) {
        let next = self.due.next(self.outbox.has_room());
        let draining = self.draining.as_mut().filter(|_| self.closing_at.is_none());
        tokio::select! {
            biased;
            event = self.account_events.next() => match event {
                AccountEvent::SessionsEnded => self.due.recheck = Some(Instant::now()),
                AccountEvent::KeyPackageTaken => self.due.count_packages = Some(self.low_allowed),
            },
            () = began(draining) => {
                let now = Instant::now();
                self.due.tell_of_drain = Some(now + OsRng.gen_range(Duration::ZERO..DRAIN_SPREAD));
                self.closing_at = Some(now + DRAIN_DEADLINE);
            }
            () = self.wake.woken() => self.due.look = Some(Instant::now()),
            () = sleep_until(next) => {}
        }
    }

    /// Does what is due, and tells the client what there is to tell.
    async fn act(&mut self) -> ControlFlow<()> {
        let Some(conn) = self.conn.upgrade() else { return ControlFlow::Break(()) };
        let now = Instant::now();
        if take_due(&mut self.due.recheck, now) {
            self.recheck(&conn, now).await;
        }
        if self.outbox.has_room() && take_due(&mut self.due.look, now) && !self.outbox.session_ended
        {
            self.look(now).await;
        }
        if take_due(&mut self.due.count_packages, now) {
            self.count_packages(now).await;
        }
        if take_due(&mut self.due.tell_of_drain, now) {
            self.outbox.closing_at = self.closing_at;
        }
        self.flush(&conn, now)
    }

    async fn recheck(&mut self, conn: &Arc<Connection>, now: Instant) {
        let cx = Cx { app: &self.app, conn, now: self.app.clock.now() };
        self.due.recheck = match auth::recheck(cx, &self.caller).await {
            Ok(()) => Some(now + RECHECK_EVERY),
            Err(Error::SessionExpired) => {
                self.outbox.session_ended = true;
                None
            }
            Err(_) => Some(now + RETRY),
        };
    }

    /// Looks what is new in the inbox. If nothing is, something that was announced before may have
    /// been on its way to another reader and come back: then the first that is there is announced
    /// again.
    async fn look(&mut self, now: Instant) {
        let looked = match self.peek(self.seen, LOOK).await {
            Ok(page) if page.envelopes.is_empty() && self.seen > Seq::ZERO => {
                self.peek(Seq::ZERO, FIRST).await
            }
            other => other,
        };
        let page = match looked {
            Ok(page) => page,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a subscription could not look"
                );
                self.due.look = Some(now + RETRY);
                return;
            }
        };
        let news = page.envelopes.last().is_some_and(|last| last.seq > self.seen);
        for envelope in &page.envelopes {
            let newest = self.outbox.wakes.entry(envelope.channel).or_default();
            *newest = envelope.seq.max(*newest);
            self.seen = envelope.seq.max(self.seen);
        }
        if news && page.more {
            self.due.look = Some(now);
        }
    }

    async fn peek(&self, after: Seq, limit: PageLimit) -> StoreResult<Page> {
        self.app.stores.inboxes.peek(self.read, after, limit, self.app.clock.now()).await
    }

    async fn count_packages(&mut self, now: Instant) {
        let stock =
            self.app.stores.key_packages.stock(self.caller.account, self.app.clock.now()).await;
        match stock {
            Ok(stock) if stock.available < LOW => self.outbox.packages_low = Some(stock.available),
            Ok(_) => {}
            Err(_) => self.due.count_packages = Some(now + RETRY),
        }
    }

    /// Sends what there is to tell, as far as the client takes it.
    fn flush(&mut self, conn: &Connection, now: Instant) -> ControlFlow<()> {
        self.due.flush = None;
        while let Some(event) = self.outbox.first(now) {
            if !conn.events().send(event.event_type().code(), event.payload()) {
                self.due.flush = Some(now + RETRY);
                break;
            }
            match event {
                Event::SessionRevoked(_) => return ControlFlow::Break(()),
                Event::Draining(_) => self.draining = None,
                Event::KeyPackagesLow(_) => self.low_allowed = now + LOW_AT_MOST_EVERY,
                Event::Wake(_) | Event::Message(_) => {}
            }
            self.outbox.remove_first();
        }
        ControlFlow::Continue(())
    }
}

impl Due {
    /// When there is something to do next; `recheck` is always among them but when the session is
    /// over.
    fn next(&self, outbox_has_room: bool) -> Instant {
        // Without room, a look waits for the flush that makes room for what it finds.
        let look = self.look.filter(|_| outbox_has_room);
        let all = [look, self.recheck, self.count_packages, self.tell_of_drain, self.flush];
        all.into_iter()
            .flatten()
            .min()
            .expect("a session that is over is told of, or told of again")
    }
}

impl Outbox {
    /// Whether the Wakes of another look have room.
    fn has_room(&self) -> bool {
        self.wakes.len() < MAX_WAKES
    }

    /// What to say next. Whose session is over learns nothing else.
    fn first(&self, now: Instant) -> Option<Event> {
        if self.session_ended {
            let reason = SESSION_ENDED.to_owned();
            return Some(Event::SessionRevoked(SessionRevokedEvent { reason }));
        }
        if let Some(closing_at) = self.closing_at {
            let left = closing_at.saturating_duration_since(now).as_millis();
            let deadline_ms = u64::try_from(left).unwrap_or(u64::MAX);
            return Some(Event::Draining(DrainingEvent { deadline_ms }));
        }
        if let Some(available) = self.packages_low {
            return Some(Event::KeyPackagesLow(KeyPackagesLowEvent { available }));
        }
        let (channel, seq) = self.wakes.first_key_value()?;
        let channel_id = Bytes::copy_from_slice(channel.as_bytes());
        Some(Event::Wake(WakeEvent { channel_id, seq: seq.0 }))
    }

    /// The first was said.
    fn remove_first(&mut self) {
        if self.closing_at.take().is_none() && self.packages_low.take().is_none() {
            self.wakes.pop_first();
        }
    }
}

/// Completes when the server begins to drain; never for `None`.
async fn began(draining: Option<&mut watch::Receiver<bool>>) {
    match draining {
        Some(draining) => drain_began(draining).await,
        None => std::future::pending().await,
    }
}

/// Whether it is due, which is noted as done.
fn take_due(due: &mut Option<Instant>, now: Instant) -> bool {
    due.take_if(|due| *due <= now).is_some()
}
