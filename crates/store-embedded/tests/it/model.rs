//! A model of the embedded store: maps in memory, with the same operations and answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use qpq_domain::UnixMillis;

use crate::ops::{
    MINUTE, Message, Op, Package, channel, limits, page_text, receipt_text, session_text,
};

/// The state of a store, where each number is an account, channel, id, package or session.
#[derive(Default)]
pub(crate) struct Model {
    accounts: Vec<Account>,
    inboxes: BTreeMap<u8, Inbox>,
    leases: HashMap<u8, Leased>,
    packages: BTreeMap<u8, Packages>,
    hybrid: BTreeMap<u8, u8>,
    sessions: BTreeMap<u8, (u8, Option<u8>, [UnixMillis; 3])>,
}

struct Account {
    name: u8,
    key: u8,
    record: u8,
    at: UnixMillis,
}

#[derive(Default)]
struct Inbox {
    last_seq: u64,
    queue: BTreeMap<u64, Queued>,
    /// By sender and id: removed messages, and until when their ids are remembered.
    removed: HashMap<(u8, u8), (u64, Queued, UnixMillis)>,
}

#[derive(Clone)]
struct Queued {
    from: u8,
    id: Option<u8>,
    channel: u8,
    size: usize,
    at: UnixMillis,
    expires: UnixMillis,
}

struct Leased {
    inbox: u8,
    seqs: Vec<u64>,
}

#[derive(Default)]
struct Packages {
    /// In order of upload: number, last resort, last valid instant.
    stored: Vec<(u8, bool, UnixMillis)>,
    given_out: HashMap<u8, UnixMillis>,
}

impl Inbox {
    fn remove(&mut self, seq: u64, at: UnixMillis) {
        if let Some(queued) = self.queue.remove(&seq)
            && let Some(id) = queued.id
        {
            let until = at.plus(limits().delivery.recent_ids);
            self.removed.insert((queued.from, id), (seq, queued, until));
        }
    }

    /// Removes messages at their expiry.
    fn expire(&mut self, now: UnixMillis) {
        let expired: Vec<_> = self
            .queue
            .iter()
            .filter(|(_, q)| q.expires <= now)
            .map(|(seq, q)| (*seq, q.expires))
            .collect();
        expired.into_iter().for_each(|(seq, at)| self.remove(seq, at));
    }

    fn known(&self, from: u8, id: u8, now: UnixMillis) -> Option<(u64, &Queued)> {
        let queued = self.queue.iter().find(|(_, q)| (q.from, q.id) == (from, Some(id)));
        queued.map(|(seq, q)| (*seq, q)).or_else(|| {
            self.removed
                .get(&(from, id))
                .filter(|(.., until)| *until > now)
                .map(|(seq, q, _)| (*seq, q))
        })
    }
}

impl Model {
    /// Ends the leases, as a crash does.
    pub(crate) fn crash(&mut self) {
        self.leases.clear();
    }

    fn exists(&self, key: u8) -> bool {
        self.accounts.iter().any(|account| account.key == key)
    }

    /// Executes one operation at `now` and returns the answer.
    pub(crate) fn apply(&mut self, op: &Op, now: UnixMillis) -> String {
        self.inboxes.values_mut().for_each(|inbox| inbox.expire(now));
        match op {
            Op::Register { name, key, record } => {
                self.register(*name, *key, *record, now).to_owned()
            }
            Op::Find { key } => {
                self.accounts.iter().find(|account| account.key == *key).map_or_else(
                    || "no account".to_owned(),
                    |account| format!("user{} {} {}", account.name, account.record, account.at.0),
                )
            }
            Op::Enqueue(messages) => messages
                .iter()
                .map(|message| self.enqueue(message, now))
                .collect::<Vec<_>>()
                .join(", "),
            Op::Upload { owner, .. }
            | Op::PutHybrid { owner, .. }
            | Op::CreateSession { owner, .. }
            | Op::RevokeAll { owner }
                if !self.exists(*owner) =>
            {
                "no account".to_owned()
            }
            Op::Upload { owner, packages } => self.upload(*owner, packages, now),
            Op::Take { target } => self.take(*target, now),
            Op::PutHybrid { owner, key } => {
                self.hybrid.insert(*owner, *key);
                "put".to_owned()
            }
            Op::GetHybrid { targets } => {
                format!(
                    "{:?}",
                    targets.iter().map(|n| self.hybrid.get(n).copied()).collect::<Vec<_>>()
                )
            }
            Op::Lease { .. }
            | Op::Complete { .. }
            | Op::Release { .. }
            | Op::Peek { .. }
            | Op::Ack { .. } => self.read(op, now),
            Op::Sweep => {
                self.sessions.retain(|_, (_, _, [.., expires])| *expires > now);
                "swept".to_owned()
            }
            _ => self.session(op, now),
        }
    }

    fn register(&mut self, name: u8, key: u8, record: u8, now: UnixMillis) -> &'static str {
        if let Some(existing) = self.accounts.iter().find(|account| account.name == name) {
            let is_same = existing.key == key && existing.record == record;
            return if is_same { "repeated" } else { "UsernameTaken" };
        }
        if self.exists(key) {
            return "IdentityTaken";
        }
        self.accounts.push(Account { name, key, record, at: now });
        self.inboxes.insert(key, Inbox::default());
        "registered"
    }

    fn enqueue(&mut self, message: &Message, now: UnixMillis) -> String {
        let Some(inbox) = self.inboxes.get_mut(&message.to) else {
            return "NoSuchRecipient".to_owned();
        };
        let receipt = |what, seq, q: &Queued| {
            let hash = u8::try_from(q.size % 251).expect("small");
            receipt_text(what, seq, channel(q.channel).as_bytes(), hash, q.at.0)
        };
        // A message without any time to live is accepted and expires immediately.
        inbox.expire(now);
        if let Some((seq, q)) = message.id.and_then(|id| inbox.known(message.from, id, now)) {
            return receipt("duplicate", seq, q);
        }
        let limits = limits().delivery;
        let bytes: usize = inbox.queue.values().map(|q| q.size).sum();
        if inbox.queue.len() as u64 >= limits.max_messages
            || (bytes + message.size) as u64 > limits.max_bytes
        {
            return "QueueFull".to_owned();
        }
        let of_sender = || inbox.queue.values().filter(|q| q.from == message.from);
        let sender_bytes: usize = of_sender().map(|q| q.size).sum();
        let is_crowded = inbox.queue.len() as u64 * 2 > limits.max_messages
            || bytes as u64 * 2 > limits.max_bytes;
        if is_crowded
            && (of_sender().count() as u64 + 1 > limits.max_messages / limits.sender_share
                || (sender_bytes + message.size) as u64 > limits.max_bytes / limits.sender_share)
        {
            return "SenderShare".to_owned();
        }
        inbox.last_seq += 1;
        let expires = now.plus(MINUTE * message.minutes.into());
        let Message { from, id, channel, size, .. } = *message;
        let queued = Queued { from, id, channel, size, at: now, expires };
        let text = receipt("accepted", inbox.last_seq, &queued);
        inbox.queue.insert(inbox.last_seq, queued);
        text
    }

    fn leased(&self, inbox: u8) -> BTreeSet<u64> {
        let leases = self.leases.values().filter(|lease| lease.inbox == inbox);
        leases.flat_map(|lease| lease.seqs.iter().copied()).collect()
    }

    /// Returns the page as text, and its seqs.
    fn page(
        &self,
        inbox: u8,
        view: Option<u8>,
        after: u64,
        messages: u32,
        bytes: usize,
    ) -> (String, Vec<u64>) {
        let leased = self.leased(inbox);
        let none = BTreeMap::new();
        let queue = self.inboxes.get(&inbox).map_or(&none, |inbox| &inbox.queue);
        let visible: Vec<_> = queue
            .iter()
            .filter(|(seq, q)| **seq > after && view.is_none_or(|n| n == q.channel))
            .take_while(|(seq, _)| !leased.contains(seq))
            .collect();
        let mut cost = 0;
        let shown: Vec<_> = visible
            .iter()
            .enumerate()
            .take_while(|(index, (_, q))| {
                cost += q.size + 64;
                *index < messages as usize && (*index == 0 || cost <= bytes)
            })
            .map(|(_, (seq, q))| (**seq, channel(q.channel), q.size, q.at.0))
            .collect();
        let text = page_text(
            shown.iter().map(|(seq, channel, size, at)| (*seq, channel.as_bytes(), *size, *at)),
            shown.len() < visible.len(),
        );
        (text, shown.iter().map(|(seq, ..)| *seq).collect())
    }

    fn read(&mut self, op: &Op, now: UnixMillis) -> String {
        match op {
            Op::Lease { inbox, view, messages, bytes, slot } => {
                self.leases.remove(slot);
                let (text, seqs) = self.page(*inbox, *view, 0, *messages, *bytes);
                self.leases.insert(*slot, Leased { inbox: *inbox, seqs });
                text
            }
            Op::Complete { slot } => match self.leases.remove(slot) {
                None => "no lease".to_owned(),
                Some(lease) => {
                    if let Some(inbox) = self.inboxes.get_mut(&lease.inbox) {
                        lease.seqs.into_iter().for_each(|seq| inbox.remove(seq, now));
                    }
                    "completed".to_owned()
                }
            },
            Op::Release { slot } => {
                self.leases.remove(slot).map_or("no lease", |_| "released").to_owned()
            }
            Op::Peek { inbox, view, after, messages } => {
                self.page(*inbox, *view, *after, *messages, usize::MAX).0
            }
            Op::Ack { inbox, view, up_to, seqs } => {
                let Some(inbox) = self.inboxes.get_mut(inbox) else { return "acked 0".to_owned() };
                let acked: Vec<u64> = inbox
                    .queue
                    .iter()
                    .filter(|(seq, q)| {
                        view.is_none_or(|n| n == q.channel)
                            && (Some(**seq) <= *up_to || seqs.contains(seq))
                    })
                    .map(|(seq, _)| *seq)
                    .collect();
                acked.iter().for_each(|seq| inbox.remove(*seq, now));
                format!("acked {}", acked.len())
            }
            other => unreachable!("{other:?}"),
        }
    }

    fn upload(&mut self, owner: u8, packages: &[Package], now: UnixMillis) -> String {
        let kept = self.packages.entry(owner).or_default();
        let mut stored: Vec<_> =
            kept.stored.iter().copied().filter(|(.., until)| *until >= now).collect();
        for (index, package) in packages.iter().enumerate() {
            if stored.iter().any(|(n, ..)| *n == package.n) {
                continue;
            }
            if kept.given_out.get(&package.n).is_some_and(|until| *until >= now) {
                return format!("GivenOut({index})");
            }
            if package.last_resort {
                stored.retain(|(_, last_resort, _)| !last_resort);
            }
            let until = now.plus(MINUTE * package.minutes.into());
            stored.push((package.n, package.last_resort, until));
        }
        if stored.len() > limits().key_packages.max_count as usize {
            return "Full".to_owned();
        }
        kept.stored = stored;
        let last = kept.stored.iter().filter(|(_, last_resort, _)| *last_resort).count();
        format!("stored {} {}", kept.stored.len() - last, last > 0)
    }

    fn take(&mut self, target: u8, now: UnixMillis) -> String {
        let Some(kept) = self.packages.get_mut(&target) else { return "none".to_owned() };
        let pick = |wanted| {
            kept.stored.iter().position(|(_, last, until)| *last == wanted && *until >= now)
        };
        let Some(index) = pick(false).or_else(|| pick(true)) else { return "none".to_owned() };
        let (n, last_resort, until) = kept.stored[index];
        if !last_resort {
            kept.stored.remove(index);
        }
        kept.given_out.insert(n, until);
        format!("took {n} {last_resort}")
    }

    fn session(&mut self, op: &Op, now: UnixMillis) -> String {
        let after = |minutes: u8| now.plus(MINUTE * minutes.into());
        match op {
            Op::CreateSession { token, owner, minutes } => {
                let device = (token % 2 == 0).then_some(*token);
                self.sessions.entry(*token).or_insert((
                    *owner,
                    device,
                    [now, now, after(*minutes)],
                ));
                "opened".to_owned()
            }
            Op::FindSession { token } => self.sessions.get(token).map_or_else(
                || "none".to_owned(),
                |(owner, device, at)| session_text(*owner, *device, *at),
            ),
            Op::Touch { token, minutes } => {
                if let Some((_, _, [_, used, expires])) = self.sessions.get_mut(token) {
                    (*used, *expires) = (now, after(*minutes));
                }
                "touched".to_owned()
            }
            Op::Revoke { token } => {
                format!("revoked {}", u8::from(self.sessions.remove(token).is_some()))
            }
            Op::RevokeAll { owner } => {
                let before = self.sessions.len();
                self.sessions.retain(|_, (of, ..)| of != owner);
                format!("revoked {}", before - self.sessions.len())
            }
            other => unreachable!("{other:?}"),
        }
    }
}
