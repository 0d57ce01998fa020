//! Additions to queues. One call of the script adds to the queues of many inboxes, and contains a
//! payload once for all of its queues: a message to a group, or to an account with several devices.

use std::{collections::HashMap, sync::LazyLock};

use bytes::{Bytes, BytesMut};
use qpq_domain::{IdentityKey, StoreId};
use qpq_ports::{StoreResult, View};
use redis::Script;

use super::{MAX_MESSAGES, Queued, ReaderId, Redis, RegistrationId, WAITERS, history, number};

static PUSH: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("../scripts/push.lua")));

/// Maximum bytes pushed to a queue. Beyond it, the queue is dropped, and the next load counts
/// again: removals do not reduce the count.
const BYTES_PUSHED: u64 = 4 << 20;

/// Maximum queues and bytes of payloads in one call. Redis executes nothing else during a call.
const CALL_QUEUES: usize = 64;
const CALL_BYTES: usize = 256 << 10;

/// Messages that were accepted into an inbox, for the queues of its readers.
#[derive(Debug)]
pub(crate) struct Push {
    pub(crate) inbox: IdentityKey,
    /// The devices of the inbox; `None` for the single reader.
    pub(crate) devices: Option<Vec<RegistrationId>>,
    /// The channel of the messages, or all channels.
    pub(crate) view: View,
    pub(crate) messages: Vec<Queued>,
}

impl Push {
    /// Returns the readers whose queues get the messages. There are none if the inbox has devices
    /// that the committer has not seen yet.
    fn readers(&self) -> impl Iterator<Item = ReaderId> {
        let devices = self.devices.iter().flatten().map(|device| Some(*device));
        let single = self.devices.is_none().then_some(None);
        devices.chain(single).map(|registration| ReaderId { inbox: self.inbox, registration })
    }

    fn bytes(&self) -> usize {
        self.messages.iter().map(|queued| queued.envelope.payload.len()).sum()
    }
}

impl Redis {
    /// Divides pushes into groups, one for each call of the script. The keys of a call must be in
    /// one slot of a Redis Cluster, so there each inbox has a call of its own.
    pub(crate) fn calls(&self, pushes: Vec<Push>) -> Vec<Vec<Push>> {
        let mut calls: Vec<Vec<Push>> = Vec::new();
        let (mut queues, mut bytes) = (0, 0);
        for push in pushes {
            let (more_queues, more_bytes) = (push.readers().count().max(1), push.bytes());
            (queues, bytes) = (queues + more_queues, bytes + more_bytes);
            match calls.last_mut() {
                Some(call) if !self.has_slots() && queues <= CALL_QUEUES && bytes <= CALL_BYTES => {
                    call.push(push);
                }
                _ => {
                    (queues, bytes) = (more_queues, more_bytes);
                    calls.push(vec![push]);
                }
            }
        }
        calls
    }

    /// Adds messages that were committed in a history to the queues that are loaded and of the same
    /// history. Returns the edges that wait for each inbox.
    pub(crate) async fn push(
        &self,
        store_id: &StoreId,
        pushes: &[Push],
    ) -> StoreResult<Vec<Vec<String>>> {
        let (keys, args) = self.arguments(store_id, pushes);
        self.script("push", &PUSH, &keys, &args).await
    }

    fn arguments(&self, store_id: &StoreId, pushes: &[Push]) -> (Vec<String>, Vec<Bytes>) {
        let (mut keys, mut each) = (Vec::new(), Vec::new());
        let mut payloads = Payloads::default();
        for push in pushes {
            keys.extend(self.keys(&ReaderId::single(push.inbox), [WAITERS]));
            let before = keys.len();
            for reader in push.readers() {
                keys.extend(self.keys(&reader, ["m2", "q2"]));
            }
            let queues = (keys.len() - before) / 2;
            each.extend([number(queues as u64), number(push.messages.len() as u64)]);
            for queued in &push.messages {
                let mut prefix = BytesMut::new();
                queued.put_prefix(&mut prefix);
                let place = payloads.place(&queued.envelope.payload);
                each.extend([number(queued.envelope.seq.0), prefix.freeze(), number(place)]);
            }
        }
        let mut args = vec![history(store_id), number(MAX_MESSAGES), number(BYTES_PUSHED)];
        args.push(number(payloads.all.len() as u64));
        args.append(&mut payloads.all);
        args.append(&mut each);
        (keys, args)
    }
}

/// The distinct payloads of a call.
#[derive(Default)]
struct Payloads {
    all: Vec<Bytes>,
    places: HashMap<(*const u8, usize), u64>,
}

impl Payloads {
    /// Returns the place of a payload, from 1. Two messages share a payload if they share its
    /// memory, as in a fan-out.
    fn place(&mut self, payload: &Bytes) -> u64 {
        *self.places.entry((payload.as_ptr(), payload.len())).or_insert_with(|| {
            self.all.push(payload.clone());
            self.all.len() as u64
        })
    }
}
