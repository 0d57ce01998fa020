//! Messages that came before what they need: for a group whose Welcome is still on its way, or for
//! an epoch whose commit is. They are kept in the order of their coming, within bounds, and tried
//! again when something arrives.

use std::collections::VecDeque;

use crate::{
    codec::{Malformed, Reader, Writer},
    profile::GroupId,
};

/// The most messages that wait for groups unknown here, and the most that wait for epochs of known
/// groups. Apart, so that whoever invents groups cannot push out what a real one needs.
const MAX_MESSAGES: usize = 256;

/// The most bytes that wait, for each of the two.
const MAX_BYTES: usize = 8 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Welcome,
    Commit,
}

struct Message {
    group: GroupId,
    epoch: u64,
    needs: Needs,
    bytes: Vec<u8>,
}

#[derive(Default)]
pub(crate) struct Waiting(VecDeque<Message>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    New,
    Already,
}

impl Waiting {
    /// Keeps a message; the oldest that need the same go if there are too many.
    pub(crate) fn hold(&mut self, group: GroupId, epoch: u64, needs: Needs, bytes: &[u8]) -> Held {
        if self.0.iter().any(|message| message.bytes == bytes) {
            return Held::Already;
        }
        self.0.push_back(Message { group, epoch, needs, bytes: bytes.to_vec() });
        while self.is_over(needs) {
            let oldest = self.0.iter().position(|message| message.needs == needs);
            self.0.remove(oldest.expect("too many are not none"));
        }
        Held::New
    }

    /// Takes a message of `group` that needs nothing more when the group is at `epoch`: of the
    /// earliest epoch, the one that came first.
    pub(crate) fn release(&mut self, group: &GroupId, epoch: u64) -> Option<Vec<u8>> {
        // What waited for the Welcome waits for commits from now on.
        for message in self.0.iter_mut().filter(|message| message.group == *group) {
            message.needs = Needs::Commit;
        }
        let ready =
            self.0.iter().enumerate().filter(|(_, m)| m.group == *group && m.epoch <= epoch);
        let (next, _) = ready.min_by_key(|(position, message)| (message.epoch, *position))?;
        self.0.remove(next).map(|message| message.bytes)
    }

    /// Drops what waits for `group`.
    pub(crate) fn drop_group(&mut self, group: &GroupId) {
        self.0.retain(|message| message.group != *group);
    }

    fn is_over(&self, needs: Needs) -> bool {
        let same = || self.0.iter().filter(|message| message.needs == needs);
        same().count() > MAX_MESSAGES
            || same().map(|message| message.bytes.len()).sum::<usize>() > MAX_BYTES
    }

    pub(crate) fn written_len(&self) -> usize {
        8 + self.0.iter().map(|message| 32 + 8 + 1 + 4 + message.bytes.len()).sum::<usize>()
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.count(self.0.len());
        for message in &self.0 {
            writer.raw(message.group.as_bytes());
            writer.number(message.epoch);
            writer.raw(&[match message.needs {
                Needs::Welcome => 0,
                Needs::Commit => 1,
            }]);
            writer.bytes(&message.bytes);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let messages = reader.list(|reader| {
            Ok(Message {
                group: GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?,
                epoch: reader.number()?,
                needs: match reader.array()? {
                    [0] => Needs::Welcome,
                    [1] => Needs::Commit,
                    _ => return Err(Malformed),
                },
                bytes: reader.bytes()?.to_vec(),
            })
        })?;
        Ok(Self(messages.into()))
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::IdentityKey;

    use super::*;

    fn group() -> GroupId {
        GroupId::random(&IdentityKey::new([1; 32]))
    }

    #[test]
    fn messages_are_released_by_epoch_and_in_the_order_of_their_coming() {
        let (ours, other) = (group(), group());
        let mut waiting = Waiting::default();
        for (group, epoch, bytes) in
            [(ours, 3, b"c"), (ours, 2, b"a"), (other, 1, b"x"), (ours, 2, b"b")]
        {
            assert_eq!(waiting.hold(group, epoch, Needs::Welcome, bytes), Held::New);
        }
        assert_eq!(waiting.hold(ours, 2, Needs::Commit, b"a"), Held::Already);
        assert_eq!(waiting.release(&ours, 1), None);
        assert_eq!(waiting.release(&ours, 2).as_deref(), Some(&b"a"[..]));
        assert_eq!(
            waiting.release(&ours, 3).as_deref(),
            Some(&b"b"[..]),
            "the earlier epoch first"
        );
        assert_eq!(waiting.release(&ours, 2), None);
        assert_eq!(waiting.release(&ours, 3).as_deref(), Some(&b"c"[..]));
    }

    #[test]
    fn unknown_groups_cannot_push_out_what_known_ones_need() {
        let known = group();
        let mut waiting = Waiting::default();
        waiting.hold(known, 2, Needs::Commit, b"needed");
        for number in 0..2 * MAX_MESSAGES {
            waiting.hold(group(), 0, Needs::Welcome, &number.to_be_bytes());
        }
        assert_eq!(waiting.0.len(), 1 + MAX_MESSAGES);
        assert_eq!(waiting.release(&known, 2).as_deref(), Some(&b"needed"[..]));
    }

    #[test]
    fn the_bytes_that_wait_are_bounded() {
        let mut waiting = Waiting::default();
        for number in 0..20_u8 {
            waiting.hold(group(), 0, Needs::Welcome, &vec![number; 1024 * 1024]);
        }
        assert_eq!(waiting.0.len(), 8);
        assert_eq!(waiting.0.front().map(|message| message.bytes[0]), Some(12), "the oldest went");
    }
}
