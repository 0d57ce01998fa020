//! A model of the embedded store: maps in memory, with the same operations and answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use qpq_domain::UnixMillis;
use qpq_ports::{CALLS_ENDED, FETCH_DAY};

use crate::ops::{
    DELETED, FETCHES, GROUP, GroupResult, GroupSend, MEMBERS, MINUTE, Message, OF_AN_ACCOUNT, Op,
    Package, bundle_text, channel, device_text, invite_text, limits, page_text, receipt_text,
    session_text,
};

/// The state of a store, where each number is an account, channel, id, package or session.
#[derive(Default)]
pub(crate) struct Model {
    accounts: Vec<Account>,
    invites: BTreeMap<u8, Invite>,
    inboxes: BTreeMap<u8, Inbox>,
    leases: HashMap<u8, Leased>,
    packages: BTreeMap<u8, Packages>,
    hybrid: BTreeMap<u8, u8>,
    sessions: BTreeMap<u8, (u8, Option<u8>, [UnixMillis; 3])>,
    registrations: u64,
    /// The account and device of each key.
    device_keys: BTreeMap<u8, (u8, u8)>,
    group: Option<Group>,
    deletion: Option<Deletion>,
    bundles: BTreeMap<u8, Bundle>,
}

/// The deletion of the account [`DELETED`].
struct Deletion {
    /// The name of the account, which is reserved.
    name: u8,
    at: UnixMillis,
    /// The time of the next pass of the erasure; `None` once it is done.
    next_pass: Option<UnixMillis>,
}

/// The recovery bundle of an account.
#[derive(Default)]
struct Bundle {
    version: u64,
    /// The number of the bundle, and the instant at which it was stored.
    stored: Option<(u8, UnixMillis)>,
    /// The first of the counted fetches.
    counted_from: UnixMillis,
    fetches: u32,
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
    devices: Vec<Device>,
    queue: BTreeMap<u64, Queued>,
    /// Removed messages by sender and id, with the instant until which their ids are remembered.
    removed: HashMap<(u8, u8), (u64, Queued, UnixMillis)>,
    /// The senders that the owner blocks.
    blocked: BTreeSet<u8>,
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

struct Device {
    id: u8,
    registration: u64,
    name: u8,
    key: Option<u8>,
    registered_at: UnixMillis,
    seen_at: UnixMillis,
    /// The messages that wait for the device.
    waiting: BTreeSet<u64>,
    has_lost_position: bool,
}

struct Leased {
    inbox: u8,
    /// The registration of the device that has the lease; `None` for the single reader.
    registration: Option<u64>,
    seqs: Vec<u64>,
}

/// A group. Its members never change.
#[derive(Default)]
struct Group {
    epoch: u64,
    /// Accepted commits, by sender and id.
    commits: HashMap<(u8, u8), GroupResult>,
}

struct Invite {
    uses: u32,
    left: u32,
    expires_at: UnixMillis,
}

impl Invite {
    fn text(&self) -> String {
        invite_text(self.left, self.uses, self.expires_at)
    }
}

#[derive(Default)]
struct Packages {
    /// The packages, in the order of their upload.
    stored: Vec<StoredPackage>,
    taken: HashMap<u8, UnixMillis>,
}

#[derive(Clone, Copy)]
struct StoredPackage {
    n: u8,
    device: Option<u8>,
    last_resort: bool,
    until: UnixMillis,
}

impl Inbox {
    fn remove(&mut self, seq: u64, at: UnixMillis) {
        self.devices.iter_mut().for_each(|device| {
            device.waiting.remove(&seq);
        });
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

    /// Returns the registration of the device that reads, if the inbox has devices.
    fn reader(&self, device: Option<u8>) -> Result<Option<u64>, &'static str> {
        if self.devices.is_empty() {
            return Ok(None);
        }
        let found = self.devices.iter().find(|found| Some(found.id) == device);
        let found = found.ok_or("device required")?;
        if found.has_lost_position {
            return Err("position lost");
        }
        Ok(Some(found.registration))
    }

    /// Notes that a device has read, with a precision of ten minutes.
    fn record_seen(&mut self, device: Option<u8>, now: UnixMillis) {
        let mut seen = self.devices.iter_mut().filter(|found| Some(found.id) == device);
        if let Some(device) = seen.next()
            && now > device.seen_at.plus(10 * MINUTE)
        {
            device.seen_at = now;
        }
    }

    fn waits_for(&self, seq: u64, registration: Option<u64>) -> bool {
        match registration {
            None => self.devices.is_empty() && self.queue.contains_key(&seq),
            Some(registration) => self
                .devices
                .iter()
                .any(|device| device.registration == registration && device.waiting.contains(&seq)),
        }
    }

    /// Completes messages for a reader. Returns the number of messages that waited for the reader.
    fn complete(&mut self, seqs: &[u64], registration: Option<u64>, now: UnixMillis) -> usize {
        let waiting = |seq: &&u64| self.waits_for(**seq, registration);
        let done: Vec<u64> = seqs.iter().filter(waiting).copied().collect();
        for seq in &done {
            let mut devices = self.devices.iter_mut();
            if let Some(device) = devices.find(|device| Some(device.registration) == registration) {
                device.waiting.remove(seq);
            }
            if self.devices.iter().all(|device| !device.waiting.contains(seq)) {
                self.remove(*seq, now);
            }
        }
        done.len()
    }

    /// Removes the messages that wait for no device, if there are devices.
    fn remove_unread(&mut self, now: UnixMillis) {
        if self.devices.is_empty() {
            return;
        }
        let waits = |seq: &u64| self.devices.iter().any(|device| device.waiting.contains(seq));
        let unread: Vec<_> = self.queue.keys().copied().filter(|seq| !waits(seq)).collect();
        unread.into_iter().for_each(|seq| self.remove(seq, now));
    }

    /// Moves the devices that are absent too long and whose messages fill more than half of the
    /// inbox.
    fn move_absent(&mut self, now: UnixMillis) {
        let limits = limits().delivery;
        for device in &mut self.devices {
            let kept = device.waiting.iter().map(|seq| self.queue[seq].size as u64);
            let keeps_much = kept.clone().count() as u64 > limits.half_messages()
                || kept.sum::<u64>() > limits.half_bytes();
            let is_absent = device.seen_at.plus(limits.device_absence) <= now;
            if is_absent && (keeps_much || device.has_lost_position) {
                device.has_lost_position = true;
                device.waiting.clear();
            }
        }
        self.remove_unread(now);
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
            Op::RegisterInvited { name, key, invite } => {
                self.register_invited(*name, *key, *invite, now).to_owned()
            }
            Op::CreateInvite { n, uses, minutes } => {
                let expires_at = now.plus(MINUTE * (*minutes).into());
                let (uses, left) = ((*uses).into(), (*uses).into());
                self.invites.entry(*n).or_insert(Invite { uses, left, expires_at }).text()
            }
            Op::RevokeInvite { n } => match self.invites.remove(n) {
                Some(_) => "Revoked".to_owned(),
                None => "NotFound".to_owned(),
            },
            Op::ListInvites => {
                self.invites.values().map(Invite::text).collect::<Vec<_>>().join(", ")
            }
            Op::Find { key } => {
                self.accounts.iter().find(|account| account.key == *key).map_or_else(
                    || "no account".to_owned(),
                    |account| format!("user{} {} {}", account.name, account.record, account.at.0),
                )
            }
            Op::Delete => self.delete(now).to_owned(),
            Op::Erase => {
                self.erase(now);
                "erased".to_owned()
            }
            Op::Enqueue(messages) => messages
                .iter()
                .map(|message| self.enqueue(message, now))
                .collect::<Vec<_>>()
                .join(", "),
            Op::CreateGroup => {
                self.group.get_or_insert_default();
                "created".to_owned()
            }
            Op::SendToGroup(send) => self.send_to_group(send, now),
            Op::Upload { owner, .. }
            | Op::PutHybrid { owner, .. }
            | Op::CreateSession { owner, .. }
            | Op::RevokeAll { owner }
            | Op::ChangePassword { owner, .. }
            | Op::RegisterDevice { owner, .. }
            | Op::RevokeDevice { owner, .. }
            | Op::ConfirmPosition { owner, .. }
            | Op::ListDevices { owner }
            | Op::Block { owner, .. }
            | Op::Unblock { owner, .. }
            | Op::PutBundle { owner, .. }
            | Op::FetchBundle { owner }
            | Op::RemoveBundle { owner }
                if !self.exists(*owner) =>
            {
                "no account".to_owned()
            }
            Op::Upload { owner, device, packages } => self.upload(*owner, *device, packages, now),
            Op::Take { target } => match self.take(*target, now, |_| true) {
                None => "none".to_owned(),
                Some((n, last_resort)) => format!("took {n} {last_resort}"),
            },
            Op::TakeOfDevices { target } => self.take_of_devices(*target, now),
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
                self.inboxes.values_mut().for_each(|inbox| inbox.move_absent(now));
                "swept".to_owned()
            }
            Op::RegisterDevice { .. }
            | Op::RevokeDevice { .. }
            | Op::ConfirmPosition { .. }
            | Op::ListDevices { .. } => self.device(op, now),
            Op::Block { owner, blocked } => self.block(*owner, *blocked).to_owned(),
            Op::Unblock { owner, blocked } => self.unblock(*owner, *blocked).to_owned(),
            Op::PutBundle { .. } | Op::FetchBundle { .. } | Op::RemoveBundle { .. } => {
                self.bundle(op, now)
            }
            _ => self.session(op, now),
        }
    }

    fn block(&mut self, owner: u8, blocked: u8) -> &'static str {
        if !self.exists(blocked) {
            return "NoSuchAccount";
        }
        if owner == blocked {
            return "OwnAccount";
        }
        self.inboxes.get_mut(&owner).expect("there").blocked.insert(blocked);
        "Blocked"
    }

    fn unblock(&mut self, owner: u8, blocked: u8) -> &'static str {
        if !self.exists(blocked) {
            return "NoSuchAccount";
        }
        self.inboxes.get_mut(&owner).expect("there").blocked.remove(&blocked);
        "Unblocked"
    }

    fn device(&mut self, op: &Op, now: UnixMillis) -> String {
        match op {
            Op::RegisterDevice { owner, device, name, key, token } => {
                let outcome = self.register_device(*owner, *device, *name, *key, now);
                let is_registered = matches!(outcome, "Registered" | "Repeated");
                if let Some((of, bound @ None, _)) = self.sessions.get_mut(token)
                    && is_registered
                    && of == owner
                {
                    *bound = Some(*device);
                }
                outcome.to_owned()
            }
            Op::RevokeDevice { owner, device } => self.revoke_device(*owner, *device, now),
            Op::ConfirmPosition { owner, device } => {
                let devices = &mut self.inboxes.get_mut(owner).expect("there").devices;
                devices
                    .iter_mut()
                    .filter(|found| found.id == *device)
                    .for_each(|found| found.has_lost_position = false);
                "confirmed".to_owned()
            }
            Op::ListDevices { owner } => {
                let devices = self.inboxes[owner].devices.iter().map(|device| {
                    let instants = [device.registered_at, device.seen_at];
                    device_text(device.id, &device.name.to_string(), device.key, instants)
                });
                devices.collect::<Vec<_>>().join(", ")
            }
            other => unreachable!("{other:?}"),
        }
    }

    fn register_device(
        &mut self,
        owner: u8,
        id: u8,
        name: u8,
        key: Option<u8>,
        now: UnixMillis,
    ) -> &'static str {
        let inbox = self.inboxes.get_mut(&owner).expect("there");
        if let Some(known) = inbox.devices.iter_mut().find(|device| device.id == id) {
            if known.key != key {
                return "OtherKey";
            }
            known.name = name;
            return "Repeated";
        }
        if let Some(key) = key {
            let belongs_to = *self.device_keys.get(&key).unwrap_or(&(owner, id));
            if key == OF_AN_ACCOUNT || belongs_to != (owner, id) {
                return "KeyTaken";
            }
            self.device_keys.insert(key, (owner, id));
        }
        self.registrations += 1;
        let is_first = inbox.devices.is_empty();
        let inherited = inbox.queue.keys().copied().filter(|_| is_first).collect();
        inbox.devices.push(Device {
            id,
            registration: self.registrations,
            name,
            key,
            registered_at: now,
            seen_at: now,
            waiting: inherited,
            has_lost_position: false,
        });
        "Registered"
    }

    fn revoke_device(&mut self, owner: u8, id: u8, now: UnixMillis) -> String {
        let inbox = self.inboxes.get_mut(&owner).expect("there");
        let Some(index) = inbox.devices.iter().position(|device| device.id == id) else {
            return "NotFound".to_owned();
        };
        let revoked = inbox.devices.remove(index);
        inbox.remove_unread(now);
        let is_last_without_key =
            revoked.key.is_none() && inbox.devices.iter().all(|device| device.key.is_some());
        if let Some(packages) = self.packages.get_mut(&owner) {
            packages.stored.retain(|package| {
                package.device != Some(id) && !(is_last_without_key && package.device.is_none())
            });
        }
        let before = self.sessions.len();
        self.sessions.retain(|_, (of, device, _)| (*of, *device) != (owner, Some(id)));
        format!("Revoked {{ ended_sessions: {} }}", before - self.sessions.len())
    }

    fn register(&mut self, name: u8, key: u8, record: u8, now: UnixMillis) -> &'static str {
        if let Some(existing) = self.accounts.iter().find(|account| account.name == name) {
            let is_same = existing.key == key && existing.record == record;
            return if is_same { "repeated" } else { "UsernameTaken" };
        }
        if self.exists(key) || (self.deletion.is_some() && key == DELETED) {
            return "IdentityTaken";
        }
        if self.deletion.as_ref().is_some_and(|deletion| deletion.name == name) {
            return "UsernameTaken";
        }
        self.accounts.push(Account { name, key, record, at: now });
        self.inboxes.insert(key, Inbox::default());
        "registered"
    }

    fn register_invited(&mut self, name: u8, key: u8, invite: u8, now: UnixMillis) -> &'static str {
        let is_repeat = self
            .accounts
            .iter()
            .any(|account| (account.name, account.key, account.record) == (name, key, 1));
        let valid = self.invites.get(&invite).filter(|one| one.left > 0 && one.expires_at > now);
        if valid.is_none() && !is_repeat {
            return "InviteInvalid";
        }
        let registered = self.register(name, key, 1, now);
        if registered == "registered" {
            self.invites.get_mut(&invite).expect("a valid invite").left -= 1;
        }
        registered
    }

    fn delete(&mut self, now: UnixMillis) -> &'static str {
        let Some(place) = self.accounts.iter().position(|account| account.key == DELETED) else {
            return "no account";
        };
        let name = self.accounts.remove(place).name;
        self.inboxes.remove(&DELETED);
        self.bundles.remove(&DELETED);
        self.packages.remove(&DELETED);
        self.hybrid.remove(&DELETED);
        self.sessions.retain(|_, (owner, ..)| *owner != DELETED);
        self.deletion = Some(Deletion { name, at: now, next_pass: Some(now) });
        "deleted"
    }

    /// Removes the sender from messages of the deleted account, if a pass of the erasure is due.
    fn erase(&mut self, now: UnixMillis) {
        let Some(Deletion { at, next_pass: next_pass @ Some(_), .. }) = &mut self.deletion else {
            return;
        };
        if *next_pass > Some(now) {
            return;
        }
        for inbox in self.inboxes.values_mut() {
            inbox.removed.retain(|(from, _), _| *from != DELETED);
            for queued in inbox.queue.values_mut().filter(|queued| queued.from == DELETED) {
                (queued.from, queued.id) = (0, None);
            }
        }
        let calls_ended = at.plus(CALLS_ENDED);
        *next_pass = (now < calls_ended).then_some(calls_ended);
    }

    fn enqueue(&mut self, message: &Message, now: UnixMillis) -> String {
        let Some(inbox) = self.inboxes.get_mut(&message.to) else {
            return "NoSuchRecipient".to_owned();
        };
        let receipt = |what, seq, q: &Queued| {
            let hash = u8::try_from(q.size % 251).expect("small");
            receipt_text(what, seq, channel(q.channel).as_bytes(), hash, q.at.0)
        };
        // A message with a lifetime of zero is accepted and expires immediately.
        inbox.expire(now);
        if let Some((seq, q)) = message.id.and_then(|id| inbox.known(message.from, id, now)) {
            return receipt("duplicate", seq, q);
        }
        if inbox.blocked.contains(&message.from) {
            return "Refused".to_owned();
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
        for device in &mut inbox.devices {
            device.waiting.insert(inbox.last_seq);
        }
        text
    }

    fn send_to_group(&mut self, send: &GroupSend, now: UnixMillis) -> String {
        let GroupSend { from, device, to, id, size, minutes, ahead } = send;
        if !self.exists(*from) {
            return "no account".to_owned();
        }
        let Some(group) = &self.group else { return "NotFound".to_owned() };
        if !MEMBERS.contains(from) {
            return "NotMember".to_owned();
        }
        let mut epoch = group.epoch;
        if let Some(ahead) = ahead {
            if let Some(first) = id.and_then(|id| group.commits.get(&(*from, id))) {
                return first.text(true);
            }
            if *ahead > 0 {
                return format!("StaleEpoch({epoch})");
            }
            epoch += 1;
        }
        let has_other_device =
            self.inboxes[from].devices.iter().any(|other| Some(other.id) != *device);
        let is_recipient = |member: &u8| member != from || has_other_device;
        let others = || MEMBERS.into_iter().filter(is_recipient).collect();
        let recipients = to.clone().unwrap_or_else(others);
        let message =
            Message { from: *from, to: 0, channel: GROUP, id: *id, size: *size, minutes: *minutes };
        let mut outcomes: Vec<_> = recipients
            .iter()
            .map(|to| self.enqueue(&Message { to: *to, ..message.clone() }, now))
            .collect();
        let is_repeat = ahead.is_none()
            && !outcomes.is_empty()
            && outcomes.iter().all(|outcome| outcome.starts_with("duplicate"));
        let mut skipped = 0;
        if to.is_none() {
            let is_skipped =
                |outcome: &&String| ["Refused", "QueueFull", "SenderShare"].contains(&&***outcome);
            skipped = outcomes.iter().filter(is_skipped).count();
            outcomes.clear();
        }
        let result = GroupResult { epoch, recipients: recipients.len(), skipped, outcomes };
        let text = result.text(is_repeat);
        let group = self.group.as_mut().expect("found above");
        group.epoch = epoch;
        if let (Some(id), Some(_)) = (id, ahead) {
            let as_duplicate = |outcome: &String| outcome.replace("accepted", "duplicate");
            let outcomes = result.outcomes.iter().map(as_duplicate).collect();
            group.commits.insert((*from, *id), GroupResult { outcomes, ..result });
        }
        text
    }

    fn leased(&self, inbox: u8, registration: Option<u64>) -> BTreeSet<u64> {
        let is_of_reader =
            |lease: &&Leased| (lease.inbox, lease.registration) == (inbox, registration);
        let leases = self.leases.values().filter(is_of_reader);
        leases.flat_map(|lease| lease.seqs.iter().copied()).collect()
    }

    /// Returns the page as text, and its seqs.
    fn page(
        &self,
        of: u8,
        registration: Option<u64>,
        view: Option<u8>,
        after: u64,
        messages: u32,
        bytes: usize,
    ) -> (String, Vec<u64>) {
        let leased = self.leased(of, registration);
        let nothing = Inbox::default();
        let inbox = self.inboxes.get(&of).unwrap_or(&nothing);
        let visible: Vec<_> = inbox
            .queue
            .iter()
            .filter(|(seq, _)| inbox.waits_for(**seq, registration))
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

    /// Returns the registration of the device that reads, if the inbox has devices.
    fn reader(&self, inbox: u8, device: Option<u8>) -> Result<Option<u64>, &'static str> {
        self.inboxes.get(&inbox).map_or(Ok(None), |inbox| inbox.reader(device))
    }

    fn read(&mut self, op: &Op, now: UnixMillis) -> String {
        if let Op::Lease { slot, .. } = op {
            self.leases.remove(slot);
        }
        let registration = match op {
            Op::Lease { inbox, device, .. }
            | Op::Peek { inbox, device, .. }
            | Op::Ack { inbox, device, .. } => match self.reader(*inbox, *device) {
                Ok(registration) => registration,
                Err(refusal) => {
                    self.record_seen(op, now);
                    return refusal.to_owned();
                }
            },
            _ => None,
        };
        self.record_seen(op, now);
        match op {
            Op::Lease { inbox, view, messages, bytes, slot, .. } => {
                let (text, seqs) = self.page(*inbox, registration, *view, 0, *messages, *bytes);
                self.leases.insert(*slot, Leased { inbox: *inbox, registration, seqs });
                text
            }
            Op::Complete { slot } => match self.leases.remove(slot) {
                None => "no lease".to_owned(),
                Some(Leased { inbox, registration, seqs }) => {
                    if let Some(inbox) = self.inboxes.get_mut(&inbox) {
                        inbox.complete(&seqs, registration, now);
                    }
                    "completed".to_owned()
                }
            },
            Op::Release { slot } => {
                self.leases.remove(slot).map_or("no lease", |_| "released").to_owned()
            }
            Op::Peek { inbox, view, after, messages, .. } => {
                self.page(*inbox, registration, *view, *after, *messages, usize::MAX).0
            }
            Op::Ack { inbox, view, up_to, seqs, .. } => {
                let Some(inbox) = self.inboxes.get_mut(inbox) else { return "acked 0".to_owned() };
                let named: Vec<u64> = inbox
                    .queue
                    .iter()
                    .filter(|(seq, q)| {
                        view.is_none_or(|n| n == q.channel)
                            && (Some(**seq) <= *up_to || seqs.contains(seq))
                    })
                    .map(|(seq, _)| *seq)
                    .collect();
                format!("acked {}", inbox.complete(&named, registration, now))
            }
            other => unreachable!("{other:?}"),
        }
    }

    /// Notes that a device has read. An ack does not count as a read.
    fn record_seen(&mut self, op: &Op, now: UnixMillis) {
        if let Op::Lease { inbox, device, .. } | Op::Peek { inbox, device, .. } = op
            && let Some(inbox) = self.inboxes.get_mut(inbox)
        {
            inbox.record_seen(*device, now);
        }
    }

    fn upload(
        &mut self,
        owner: u8,
        by: Option<u8>,
        packages: &[Package],
        now: UnixMillis,
    ) -> String {
        let kept = self.packages.entry(owner).or_default();
        let mut stored: Vec<_> =
            kept.stored.iter().copied().filter(|package| package.until >= now).collect();
        for (index, Package { n, device, last_resort, minutes }) in packages.iter().enumerate() {
            if stored.iter().any(|package| package.n == *n) {
                continue;
            }
            if kept.taken.get(n).is_some_and(|until| *until >= now) {
                return format!("Taken({index})");
            }
            if *last_resort {
                stored.retain(|package| !package.last_resort || package.device != *device);
            }
            let until = now.plus(MINUTE * (*minutes).into());
            stored.push(StoredPackage { n: *n, device: *device, last_resort: *last_resort, until });
        }
        let of = |device| {
            let is_of = move |package: &&StoredPackage| package.device == device;
            stored.iter().filter(is_of)
        };
        let max_count = limits().key_packages.max_count as usize;
        if packages.iter().any(|package| of(package.device).count() > max_count) {
            return "Full".to_owned();
        }
        let last = of(by).filter(|package| package.last_resort).count();
        let text = format!("stored {} {}", of(by).count() - last, last > 0);
        kept.stored = stored;
        text
    }

    /// Takes the oldest package that `is_of` selects by its device.
    fn take(
        &mut self,
        target: u8,
        now: UnixMillis,
        is_of: impl Fn(Option<u8>) -> bool,
    ) -> Option<(u8, bool)> {
        let kept = self.packages.get_mut(&target)?;
        let pick = |wanted| {
            kept.stored.iter().position(|package| {
                package.last_resort == wanted && package.until >= now && is_of(package.device)
            })
        };
        let index = pick(false).or_else(|| pick(true))?;
        let StoredPackage { n, last_resort, until, .. } = kept.stored[index];
        if !last_resort {
            kept.stored.remove(index);
        }
        kept.taken.insert(n, until);
        Some((n, last_resort))
    }

    fn take_of_devices(&mut self, target: u8, now: UnixMillis) -> String {
        let devices = self.inboxes.get(&target).map_or(&[][..], |inbox| &inbox.devices);
        let devices: Vec<_> = devices.iter().map(|device| (device.id, device.key)).collect();
        let taken = devices.into_iter().map(|(id, key)| {
            let is_of =
                |device: Option<u8>| device == Some(id) || (device.is_none() && key.is_none());
            (id, self.take(target, now, is_of))
        });
        format!("{:?}", taken.collect::<Vec<_>>())
    }

    fn bundle(&mut self, op: &Op, now: UnixMillis) -> String {
        let (Op::PutBundle { owner, .. } | Op::FetchBundle { owner } | Op::RemoveBundle { owner }) =
            op
        else {
            unreachable!("{op:?}")
        };
        let bundle = self.bundles.entry(*owner).or_default();
        match op {
            Op::PutBundle { replaces, n, .. } => {
                let is_repeat = bundle.version == replaces + 1
                    && bundle.stored.is_some_and(|(stored, _)| stored == *n);
                if bundle.version == *replaces {
                    bundle.version += 1;
                    bundle.stored = Some((*n, now));
                } else if !is_repeat {
                    return "OtherVersion".to_owned();
                }
                "Stored".to_owned()
            }
            Op::FetchBundle { .. } => {
                let Some((n, at)) = bundle.stored else {
                    return format!("Absent({})", bundle.version);
                };
                if now >= bundle.counted_from.plus(FETCH_DAY) {
                    (bundle.counted_from, bundle.fetches) = (now, 0);
                }
                if bundle.fetches == FETCHES {
                    let wait = bundle.counted_from.plus(FETCH_DAY).since(now);
                    return format!("Limited({wait:?})");
                }
                bundle.fetches += 1;
                bundle_text(bundle.version, n, at)
            }
            _ => {
                let removed = bundle.stored.take().is_some();
                bundle.version += u64::from(removed);
                format!("removed {removed}")
            }
        }
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
            Op::ChangePassword { owner, token, record } => {
                if self.sessions.get(token).is_none_or(|(of, ..)| of != owner) {
                    return "session ended".to_owned();
                }
                let mut accounts = self.accounts.iter_mut();
                accounts.find(|account| account.key == *owner).expect("there").record = *record;
                let before = self.sessions.len();
                self.sessions.retain(|n, (of, ..)| of != owner || n == token);
                format!("changed, revoked {}", before - self.sessions.len())
            }
            other => unreachable!("{other:?}"),
        }
    }
}
