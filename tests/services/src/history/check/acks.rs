//! The time at which each message was acked. No later read may deliver the message.

use std::collections::HashMap;

use qpq_domain::Seq;

use crate::history::{
    AckRange, Inbox, Log, Moment,
    stores::{Branch, Stores},
};

/// The times of answers to acks.
#[derive(Default)]
pub(super) struct Acks {
    named: HashMap<(Branch, Inbox, Seq), Moment>,
    /// The acks of all messages up to a seq, in seq order, each with the time of the earliest
    /// answer to an ack up to this seq or a higher one.
    through: HashMap<(Branch, Inbox), Vec<(Seq, Moment)>>,
}

impl Acks {
    pub(super) fn of(logs: &[Log], stores: &Stores) -> Self {
        let mut acks = Self::default();
        for log in logs {
            for ack in &log.acks {
                let (Some(ended), Some(store)) = (ack.ended, stores.get(ack.store)) else {
                    continue;
                };
                // An ack in another history than that of its messages removes nothing.
                if !stores.is_certain(store, ended) {
                    continue;
                }
                let branch = stores.branch(store);
                match &ack.what {
                    AckRange::Named(range) => {
                        for &seq in &log.named[range.clone()] {
                            let named = acks.named.entry((branch, ack.inbox, seq));
                            let earliest = named.or_insert(ended);
                            *earliest = ended.min(*earliest);
                        }
                    }
                    AckRange::Through(seq) => {
                        acks.through.entry((branch, ack.inbox)).or_default().push((*seq, ended));
                    }
                }
            }
        }
        for through in acks.through.values_mut() {
            through.sort_unstable();
            let mut earliest = Moment(u64::MAX);
            for (_, ended) in through.iter_mut().rev() {
                earliest = earliest.min(*ended);
                *ended = earliest;
            }
        }
        acks
    }

    /// Returns the time from which a message must not be delivered in this branch. The next branch
    /// may have lost the removal.
    pub(super) fn ended(&self, branch: Branch, inbox: Inbox, seq: Seq) -> Option<Moment> {
        let named = self.named.get(&(branch, inbox, seq)).copied();
        let through = self.through.get(&(branch, inbox)).and_then(|acks| {
            let covering = acks.partition_point(|(through, _)| *through < seq);
            acks.get(covering).map(|(_, ended)| *ended)
        });
        named.into_iter().chain(through).min()
    }
}
