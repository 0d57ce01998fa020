//! Inboxes that are being read, as queues in Redis: typed calls of the scripts in `scripts/`.
//!
//! A queue is a copy of one reader's inbox in one state: all messages up to seq `head`, after the
//! first `removals` removals of that reader, in one history. A read uses the queue only if the
//! inbox in Postgres is in that state. After a loss, an eviction or a rollback in Redis, the states
//! differ, and the queue is loaded again. Only small inboxes are loaded: most inboxes are nearly
//! empty, because a connected client reads them. Larger inboxes are read from Postgres, and Redis
//! has only their leases and waiters.
//!
//! A queue may be *ahead* of the state that the reader has read, if a transaction committed since.
//! The reader reads the state again: if Postgres is still behind, then Postgres has lost messages
//! that the queue shows, and the queue is dropped. Numbers of different histories cannot be
//! compared, so the store id is compared for equality before any number.
//!
//! A removal is committed in Postgres first and then applied here, where it also ends the lease. A
//! load from before such a removal would restore the removed messages. Therefore a reader that
//! finds no queue receives a [`Permit`] to load one, and the next removal ends the permit.
//!
//! Keys, all with the inbox as hash tag: `m2` the state and the permit, `q2` the members by seq,
//! `l` leases (seq → lease, `e`lease → end, `s`lease → history), `w` edges that wait. All but `w`
//! belong to a reader. The keys of the single reader have these names. The keys of a device also
//! contain the number of its registration.
//!
//! Everything above applies to each reader separately. The removals of a device are its completions
//! and acks, and the moves of its position. Postgres counts them under the lock of the inbox's
//! head, as it counts those of the single reader, and returns their number and the head in one
//! snapshot. Every accepted message waits for every registered device, so the seqs that are pushed
//! to the queue of a device are contiguous. If a committer has not seen a registration yet, or
//! never pushes, the queue is behind the head, which is a miss.
//!
//! A change of the readers needs no change in Redis. A new device has a number that no queue has. A
//! revoked device's number is never read again, and its queue expires. The single reader's queue
//! gets no message while devices are registered. When the last one is revoked, the number of the
//! single reader's removals is incremented in Postgres, so an earlier queue is behind the state of
//! the inbox.
//!
//! The store id is preceded by [`VERSION`], the version of this layout. So data of another version
//! counts as that of another history, which is a miss. The previous release kept state and members
//! in `m` and `q`, which this release does not read. Both releases use the same leases and waiters,
//! so the edges of one hide their leased messages from the other and wake its readers.

mod push;

use std::{sync::LazyLock, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use qpq_domain::{ChannelId, IdentityKey, Seq, StoreId, UnixMillis};
use qpq_ports::{Envelope, Page, PageLimit, StoreError, StoreResult, View};
use redis::{Cmd, Script, Value};

pub(crate) use self::push::Push;
use super::Redis;
use crate::{effects::Removal, error::NeverWritten};

/// Maximum messages, and bytes of members, of an inbox that is loaded.
pub(crate) const MAX_MESSAGES: u64 = 256;
pub(crate) const MAX_BYTES: u64 = 512 << 10;
/// Time for which a queue stays loaded after the last read.
const LOADED: Duration = Duration::from_secs(15 * 60);
/// Time for which an edge stays registered as waiting. A call that waits longer reads again before,
/// which renews the registration.
pub(crate) const REGISTERED: Duration = Duration::from_secs(90);

static READ: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/read.lua")));
static LOAD: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/load.lua")));
static CLAIM: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/claim.lua")));
static REMOVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/remove.lua")));
static REGISTER: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/register.lua")));
static RENEW: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/renew.lua")));

/// The name of the key of waiting edges, which belongs to the inbox and not to a reader.
const WAITERS: &str = "w";

/// Version of the data that the scripts store: the first byte of the state, the permit and a
/// lease's history.
const VERSION: u8 = 2;

/// Stands for a removal's number that is unknown. Such a removal drops the queue.
pub(crate) const UNKNOWN_REMOVAL: u64 = u64::MAX;

/// The number of one registration of a device. Numbers are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RegistrationId(pub(crate) i64);

/// A reader of an inbox, as determined by the inbox's head in Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ReaderId {
    pub(crate) inbox: IdentityKey,
    /// The registration of the device; `None` for the single reader of an inbox without devices.
    pub(crate) registration: Option<RegistrationId>,
}

impl ReaderId {
    /// Returns the reader of an inbox without devices.
    pub(crate) const fn single(inbox: IdentityKey) -> Self {
        Self { inbox, registration: None }
    }
}

/// A state of an inbox for one reader. Within one history both numbers only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// The history that the numbers belong to.
    pub(crate) store_id: StoreId,
    /// The seq of the newest message that was ever accepted.
    pub(crate) head: u64,
    /// The number of the reader's removals.
    pub(crate) removals: u64,
}

impl State {
    /// Returns whether Postgres, which is in this state now, has lost messages of a queue that
    /// showed the state `queue` before. A queue has only committed messages.
    pub(crate) fn has_lost(&self, queue: &Self) -> bool {
        self.store_id == queue.store_id
            && (self.head < queue.head || self.removals < queue.removals)
    }
}

/// A message in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) envelope: Envelope,
    pub(crate) expires_at: UnixMillis,
}

/// The unique name of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LeaseId(pub(crate) String);

/// The states of a queue that a read accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Only the state of the read.
    Same,
    /// The state of the read or a later one. Postgres has just confirmed that the queue was not
    /// ahead of the state of the read.
    AtLeast,
}

/// The lease of a read, and its duration unless it is renewed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseTerm<'a> {
    pub(crate) lease: &'a LeaseId,
    pub(crate) lasts: Duration,
}

/// A read of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueRead<'a> {
    pub(crate) reader: &'a ReaderId,
    pub(crate) view: View,
    /// The state that the queue must show.
    pub(crate) state: State,
    pub(crate) accept: Freshness,
    pub(crate) after: Seq,
    pub(crate) limit: PageLimit,
    pub(crate) now: UnixMillis,
    pub(crate) term: Option<LeaseTerm<'a>>,
    /// The edge to register as waiting, before the read.
    pub(crate) edge: Option<&'a str>,
}

/// The result of a read of a queue.
#[derive(Debug)]
pub(crate) enum QueueAnswer {
    /// The queue is not loaded, is behind, or is of another history. The reader may load it with
    /// messages that it reads in Postgres from now on.
    NotLoaded(Permit),
    /// The queue shows this state, which is later than the reader's.
    Ahead(State),
    Page(VisiblePage),
}

/// Permission to load a queue with messages that are read in Postgres after the permit was issued.
/// A permit ends with the next removal, or when Redis loses it, so a load cannot restore removed
/// messages.
#[derive(Debug)]
pub(crate) struct Permit(Bytes);

/// The visible messages of a view: a page up to the first leased message.
#[derive(Debug)]
pub(crate) struct VisiblePage {
    pub(crate) page: Page,
    /// The newest seq of the inbox in the state of the page.
    pub(crate) head: u64,
    /// The time until the end of the lease at which the page stops, if it stops at one.
    pub(crate) stopped_for: Option<Duration>,
}

/// The visible part of a page from Postgres, up to the first leased message.
#[derive(Debug)]
pub(crate) struct Claimed {
    /// The number of seqs before the first leased one.
    pub(crate) seqs: usize,
    /// The time until the end of the lease at which the page stops. See
    /// [`VisiblePage::stopped_for`].
    pub(crate) stopped_for: Option<Duration>,
}

impl Redis {
    /// Returns the first messages of the view, if the queue is in an accepted state.
    pub(crate) async fn read(&self, query: QueueRead<'_>) -> StoreResult<QueueAnswer> {
        let QueueRead { reader, view, state, accept, after, limit, now, term, edge } = query;
        let (view, channel) = match &view {
            View::All => ("all", Bytes::new()),
            View::Channel(channel) => ("channel", Bytes::copy_from_slice(channel.as_bytes())),
        };
        let args = [
            history(&state.store_id),
            number(state.head),
            number(state.removals),
            text(if accept == Freshness::AtLeast { "1" } else { "0" }),
            number(after.0),
            Bytes::from_static(view.as_bytes()),
            channel,
            number(limit.messages.into()),
            number(limit.bytes as u64),
            number(now.0),
            text(term.map_or("", |term| &term.lease.0)),
            millis(term.map_or(Duration::ZERO, |term| term.lasts)),
            text(edge.unwrap_or_default()),
            millis(REGISTERED),
            millis(LOADED),
        ];
        let keys = self.keys(reader, ["m2", "q2", "l", WAITERS]);
        found(state.store_id, self.script("read", &READ, &keys, &args).await?)
    }

    /// Stores the queue with the messages of the inbox in `state`, which was read after the permit
    /// was issued. Does nothing if the permit has ended.
    pub(crate) async fn load(
        &self,
        reader: &ReaderId,
        permit: Permit,
        state: State,
        messages: &[Queued],
    ) -> StoreResult<()> {
        let members: Vec<_> =
            messages.iter().map(|message| (message.envelope.seq, message.encode())).collect();
        let bytes = members.iter().map(|(_, member)| member.len() as u64).sum();
        let mut args = vec![
            history(&state.store_id),
            number(state.head),
            number(state.removals),
            number(bytes),
            millis(LOADED),
            permit.0,
        ];
        for (seq, member) in members {
            args.push(number(seq.0));
            args.push(member);
        }
        self.script("load", &LOAD, &self.keys(reader, ["m2", "q2"]), &args).await
    }

    /// Drops the queue in any state.
    pub(crate) async fn drop_queue(&self, reader: &ReaderId) -> StoreResult<()> {
        let mut unlink = Cmd::new();
        unlink.arg("UNLINK").arg(&self.keys(reader, ["m2", "q2"])[..]);
        self.command::<u64>("drop", &unlink).await.map(drop)
    }

    /// Removes everything that is stored for an inbox: the queues of the single reader and of these
    /// devices, their leases, and the waiting edges.
    pub(crate) async fn forget_inbox(
        &self,
        inbox: &IdentityKey,
        registrations: &[RegistrationId],
    ) -> StoreResult<()> {
        let mut unlink = Cmd::new();
        unlink.arg("UNLINK");
        let devices = registrations.iter().map(|registration| Some(*registration));
        for registration in devices.chain([None]) {
            let reader = ReaderId { inbox: *inbox, registration };
            unlink.arg(&self.keys(&reader, ["m2", "q2", "l", WAITERS])[..]);
        }
        self.command::<u64>("drop", &unlink).await.map(drop)
    }

    /// Leases the first `page` of `seqs`, up to the first one that is leased already. One more seq
    /// may follow: the result shows whether it is leased.
    pub(crate) async fn claim(
        &self,
        reader: &ReaderId,
        store_id: &StoreId,
        seqs: &[Seq],
        page: usize,
        term: Option<LeaseTerm<'_>>,
    ) -> StoreResult<Claimed> {
        let mut args = vec![
            history(store_id),
            text(term.map_or("", |term| &term.lease.0)),
            millis(term.map_or(Duration::ZERO, |term| term.lasts)),
            number(page as u64),
        ];
        args.extend(seqs.iter().map(|seq| number(seq.0)));
        let (seqs, stopped): (usize, u64) =
            self.script("claim", &CLAIM, &self.keys(reader, ["l"]), &args).await?;
        Ok(Claimed { seqs, stopped_for: stopped_for(stopped) })
    }

    /// Registers `edge` as waiting for the inbox, before the inbox is read from Postgres.
    pub(crate) async fn register(&self, reader: &ReaderId, edge: &str) -> StoreResult<()> {
        let args = [text(edge), millis(REGISTERED)];
        self.script::<u64>("register", &REGISTER, &self.keys(reader, [WAITERS]), &args)
            .await
            .map(drop)
    }

    /// Removes messages that Postgres has removed, and ends their lease. Returns the edges that
    /// wait for the inbox.
    pub(crate) async fn removed(&self, removal: &Removal) -> StoreResult<Vec<String>> {
        let Removal { reader, store_id, number, lease, seqs, .. } = removal;
        self.remove(reader, history(store_id), *number, lease.as_ref(), seqs).await
    }

    /// Ends a lease without a removal. Returns the edges that wait for the inbox.
    pub(crate) async fn released(
        &self,
        reader: &ReaderId,
        lease: &LeaseId,
        seqs: &[Seq],
    ) -> StoreResult<Vec<String>> {
        self.remove(reader, Bytes::new(), 0, Some(lease), seqs).await
    }

    async fn remove(
        &self,
        reader: &ReaderId,
        history: Bytes,
        removal: u64,
        lease: Option<&LeaseId>,
        seqs: &[Seq],
    ) -> StoreResult<Vec<String>> {
        let mut args = vec![history, number(removal), text(lease.map_or("", |lease| &lease.0))];
        args.extend(seqs.iter().map(|seq| number(seq.0)));
        self.script("remove", &REMOVE, &self.keys(reader, ["m2", "q2", "l", WAITERS]), &args).await
    }

    /// Renews a lease: its duration begins again now.
    pub(crate) async fn renew(&self, reader: &ReaderId, term: LeaseTerm<'_>) -> StoreResult<()> {
        let args = [text(&term.lease.0), millis(term.lasts)];
        self.script::<u64>("renew", &RENEW, &self.keys(reader, ["l"]), &args).await.map(drop)
    }

    /// Returns the keys of a reader. The key of waiting edges is the same for all readers of the
    /// inbox; the other keys of a device contain its number.
    fn keys<const N: usize>(&self, reader: &ReaderId, names: [&str; N]) -> [String; N] {
        let ReaderId { inbox, registration } = reader;
        names.map(|name| match registration {
            Some(RegistrationId(number)) if name != WAITERS => {
                self.key(format_args!("{{{inbox}}}{name}:{number}"))
            }
            _ => self.key(format_args!("{{{inbox}}}{name}")),
        })
    }
}

fn found(store_id: StoreId, answer: Value) -> StoreResult<QueueAnswer> {
    let wrong = || StoreError::corrupt(NeverWritten("the answer of read.lua"));
    let Value::Array(fields) = answer else { return Err(wrong()) };
    let number = |value: &Value| redis::from_redis_value::<u64>(value.clone()).map_err(|_| wrong());
    match &fields[..] {
        [_, Value::BulkString(permit)] => Ok(QueueAnswer::NotLoaded(Permit(permit.clone().into()))),
        [_, head, removals] => {
            let (head, removals) = (number(head)?, number(removals)?);
            Ok(QueueAnswer::Ahead(State { store_id, head, removals }))
        }
        [_, head, more, stopped, Value::Array(members)] => {
            let envelope = |member: &Value| match member {
                Value::BulkString(bytes) => {
                    Queued::decode(bytes).map(|queued| queued.envelope).ok_or_else(wrong)
                }
                _ => Err(wrong()),
            };
            let envelopes = members.iter().map(envelope).collect::<StoreResult<_>>()?;
            Ok(QueueAnswer::Page(VisiblePage {
                page: Page { store_id, envelopes, more: number(more)? == 1 },
                head: number(head)?,
                stopped_for: stopped_for(number(stopped)?),
            }))
        }
        _ => Err(wrong()),
    }
}

fn stopped_for(millis: u64) -> Option<Duration> {
    (millis > 0).then(|| Duration::from_millis(millis))
}

impl Queued {
    /// Encodes the message as a member of a queue: seq (8 bytes) ‖ expires_at (8) ‖ enqueued_at (8)
    /// ‖ length of channel (1) ‖ channel ‖ payload, big-endian. `read.lua` reads all but the
    /// payload.
    fn encode(&self) -> Bytes {
        let mut member = BytesMut::with_capacity(41 + self.envelope.payload.len());
        self.put_prefix(&mut member);
        member.put_slice(&self.envelope.payload);
        member.freeze()
    }

    /// Writes the member up to its payload.
    fn put_prefix(&self, member: &mut BytesMut) {
        let Envelope { seq, channel, enqueued_at, .. } = &self.envelope;
        let channel = channel.as_bytes();
        member.put_u64(seq.0);
        // Lua's numbers are exact up to this value, which is in the year 287 396.
        member.put_u64(self.expires_at.0.min(1 << 53));
        member.put_u64(enqueued_at.0);
        member.put_u8(u8::try_from(channel.len()).expect("0 or 16"));
        member.put_slice(channel);
    }

    fn decode(member: &[u8]) -> Option<Self> {
        let (seq, rest) = member.split_first_chunk()?;
        let (expires_at, rest) = rest.split_first_chunk()?;
        let (enqueued_at, rest) = rest.split_first_chunk()?;
        let (&length, rest) = rest.split_first()?;
        let (channel, payload) = rest.split_at_checked(length.into())?;
        Some(Self {
            envelope: Envelope {
                seq: Seq(u64::from_be_bytes(*seq)),
                channel: ChannelId::try_from(channel).ok()?,
                payload: Bytes::copy_from_slice(payload),
                enqueued_at: UnixMillis(u64::from_be_bytes(*enqueued_at)),
            },
            expires_at: UnixMillis(u64::from_be_bytes(*expires_at)),
        })
    }
}

/// Returns a history as the scripts compare it: [`VERSION`] and the store id.
fn history(store_id: &StoreId) -> Bytes {
    [&[VERSION][..], store_id.as_bytes()].concat().into()
}

fn number(n: u64) -> Bytes {
    n.to_string().into()
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn millis(duration: Duration) -> Bytes {
    number(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
