//! Messages that arrived before the Welcome of their group or the commit that leads to their epoch.
//!
//! Such messages wait within bounds, in the order of arrival, and are processed once the group is
//! joined or has advanced. No message is dropped silently: one that exceeds the bounds or waits
//! too long is returned to the caller as a [`WaitingMessage`].

use std::{collections::BTreeMap, time::Duration};

use qpq_domain::{ChannelId, UnixMillis};

use crate::{
    codec::{Malformed, Reader, Writer},
    database::{Database, DatabaseError, Item, NewItem},
    profile::GroupId,
    received::Arrival,
    tables::WAITING,
};

/// The maximum number of messages that wait for groups unknown here, and of those that wait for
/// epochs of known groups. The two are bounded separately, so that messages to invented groups
/// cannot displace those of a real one.
const MAX_MESSAGES: u64 = 256;

/// The maximum total size of the messages, in bytes, for each of the two.
const MAX_BYTES: u64 = 8 * 1024 * 1024;

/// The time for which a message waits.
///
/// Clients send with the default time to live of 30 days. After that time a Welcome or commit that
/// was sent before the message has expired. One day is added for a Welcome or commit that its
/// author's client sends only after the message.
pub(crate) const RETENTION: Duration = Duration::from_secs(31 * 24 * 3600);

/// The key of the row that holds the totals.
const TOTALS: &[u8] = b"totals";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Welcome,
    Commit,
}

/// A message that waits, or has waited, for a Welcome or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WaitingMessage {
    pub(crate) group: GroupId,
    pub(crate) epoch: u64,
    pub(crate) needs: Needs,
    pub(crate) arrival: Arrival,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    messages: [u64; 2],
    bytes: [u64; 2],
}

impl Totals {
    fn load(database: &Database) -> Result<Self, DatabaseError> {
        let Some(row) = database.get(WAITING, TOTALS)? else { return Ok(Self::default()) };
        let mut reader = Reader::new(&row);
        let mut number = || reader.number().map_err(|Malformed| damaged());
        Ok(Self { messages: [number()?, number()?], bytes: [number()?, number()?] })
    }

    fn save(&self, database: &Database) -> Result<(), DatabaseError> {
        let mut writer = Writer::with_capacity(32);
        self.messages.iter().chain(&self.bytes).for_each(|number| writer.number(*number));
        database.put(WAITING, TOTALS, None, writer.written())
    }

    fn add(&mut self, message: &WaitingMessage) {
        let place = message.needs as usize;
        self.messages[place] += 1;
        self.bytes[place] += message.bytes.len() as u64;
    }

    fn subtract(&mut self, message: &WaitingMessage) {
        let place = message.needs as usize;
        self.messages[place] = self.messages[place].saturating_sub(1);
        self.bytes[place] = self.bytes[place].saturating_sub(message.bytes.len() as u64);
    }

    fn are_over(&self, needs: Needs) -> bool {
        let place = needs as usize;
        self.messages[place] > MAX_MESSAGES || self.bytes[place] > MAX_BYTES
    }
}

/// Adds a message. If too many wait, removes and returns the oldest of those with the same need.
pub(crate) fn add(
    database: &Database,
    message: &WaitingMessage,
) -> Result<Vec<WaitingMessage>, DatabaseError> {
    append(database, message)?;
    let mut totals = Totals::load(database)?;
    totals.add(message);
    let mut displaced = Vec::new();
    while totals.are_over(message.needs) {
        let Some((number, oldest)) = oldest(database, message.needs)? else { break };
        totals.subtract(&oldest);
        database.remove_item(WAITING, number)?;
        displaced.push(oldest);
    }
    totals.save(database)?;
    Ok(displaced)
}

fn append(database: &Database, message: &WaitingMessage) -> Result<(), DatabaseError> {
    let new = NewItem {
        lane: Some(message.group.as_bytes()),
        open: message.needs == Needs::Welcome,
        key: None,
    };
    database.append(WAITING, new, message.encode().written()).map(drop)
}

/// Removes and returns the messages of `group` that can be read at `epoch`.
///
/// Messages of earlier epochs come first, then the order of arrival decides. Messages that waited
/// for the Welcome wait for commits from now on.
pub(crate) fn release(
    database: &Database,
    group: &GroupId,
    epoch: u64,
) -> Result<Vec<WaitingMessage>, DatabaseError> {
    let mut totals = Totals::load(database)?;
    let mut ready = Vec::new();
    for (number, mut message) in of_group(database, group)? {
        if message.epoch <= epoch {
            totals.subtract(&message);
            database.remove_item(WAITING, number)?;
            ready.push(message);
        } else if message.needs == Needs::Welcome {
            totals.subtract(&message);
            message.needs = Needs::Commit;
            totals.add(&message);
            database.set_open(WAITING, number, false)?;
            database.replace_item(WAITING, number, message.encode().written())?;
        }
    }
    totals.save(database)?;
    ready.sort_by_key(|message| message.epoch);
    Ok(ready)
}

/// Returns the groups that messages wait for, with the channel of the last message of each.
pub(crate) fn groups(
    database: &Database,
    needs: Needs,
) -> Result<BTreeMap<GroupId, ChannelId>, DatabaseError> {
    let mut groups = BTreeMap::new();
    let mut after = None;
    loop {
        let items = database.items_after(WAITING, after, 64)?;
        let Some(last) = items.last() else { return Ok(groups) };
        after = Some(last.number);
        for item in &items {
            let (_, message) = parse(item)?;
            if message.needs == needs {
                groups.insert(message.group, message.arrival.channel);
            }
        }
    }
}

/// Removes and returns the messages that wait for `group`.
pub(crate) fn remove_group(
    database: &Database,
    group: &GroupId,
) -> Result<Vec<WaitingMessage>, DatabaseError> {
    remove_some(database, of_group(database, group)?)
}

/// Removes and returns the messages for which `is_over` returns `true`.
pub(crate) fn remove_if(
    database: &Database,
    is_over: impl Fn(&WaitingMessage) -> bool,
) -> Result<Vec<WaitingMessage>, DatabaseError> {
    let mut over = Vec::new();
    let mut after = None;
    loop {
        let items = database.items_after(WAITING, after, 64)?;
        let Some(last) = items.last() else { break };
        after = Some(last.number);
        for item in items {
            let found = parse(&item)?;
            if is_over(&found.1) {
                over.push(found);
            }
        }
    }
    remove_some(database, over)
}

fn remove_some(
    database: &Database,
    some: Vec<(u64, WaitingMessage)>,
) -> Result<Vec<WaitingMessage>, DatabaseError> {
    let mut totals = Totals::load(database)?;
    for (number, message) in &some {
        totals.subtract(message);
        database.remove_item(WAITING, *number)?;
    }
    totals.save(database)?;
    Ok(some.into_iter().map(|(_, message)| message).collect())
}

fn oldest(
    database: &Database,
    needs: Needs,
) -> Result<Option<(u64, WaitingMessage)>, DatabaseError> {
    let mut after = None;
    loop {
        let items = match needs {
            Needs::Welcome => database.open_items(WAITING, None, 1)?,
            Needs::Commit => database.items_after(WAITING, after, 1)?,
        };
        let Some(item) = items.first() else { return Ok(None) };
        let found = parse(item)?;
        if found.1.needs == needs {
            return Ok(Some(found));
        }
        after = Some(item.number);
    }
}

/// Returns the messages that wait for `group`, in the order of arrival.
fn of_group(
    database: &Database,
    group: &GroupId,
) -> Result<Vec<(u64, WaitingMessage)>, DatabaseError> {
    let mut items = database.last_in_lane(WAITING, group.as_bytes(), u32::MAX)?;
    items.reverse();
    items.iter().map(parse).collect()
}

fn parse(item: &Item) -> Result<(u64, WaitingMessage), DatabaseError> {
    let message =
        WaitingMessage::read(&mut Reader::new(&item.value)).map_err(|Malformed| damaged())?;
    Ok((item.number, message))
}

fn damaged() -> DatabaseError {
    DatabaseError::Damaged("a waiting message is cut short".into())
}

impl WaitingMessage {
    pub(crate) fn encode(&self) -> Writer {
        let mut writer = Writer::with_capacity(32 + 8 + 1 + 8 + 20 + 4 + self.bytes.len());
        writer.raw(self.group.as_bytes());
        writer.number(self.epoch);
        writer.raw(&[self.needs as u8]);
        writer.number(self.arrival.at.0);
        writer.bytes(self.arrival.channel.as_bytes());
        writer.bytes(&self.bytes);
        writer
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            group: GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?,
            epoch: reader.number()?,
            needs: needs(reader)?,
            arrival: Arrival {
                at: UnixMillis(reader.number()?),
                channel: ChannelId::try_from(reader.bytes()?).map_err(|_| Malformed)?,
            },
            bytes: reader.bytes()?.to_vec(),
        })
    }

    /// Reads a message in the format of earlier releases, which did not save the arrival.
    pub(crate) fn read_legacy(
        reader: &mut Reader<'_>,
        arrival: Arrival,
    ) -> Result<Self, Malformed> {
        Ok(Self {
            group: GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?,
            epoch: reader.number()?,
            needs: needs(reader)?,
            arrival,
            bytes: reader.bytes()?.to_vec(),
        })
    }
}

fn needs(reader: &mut Reader<'_>) -> Result<Needs, Malformed> {
    match reader.array()? {
        [0] => Ok(Needs::Welcome),
        [1] => Ok(Needs::Commit),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::IdentityKey;

    use super::*;

    fn group() -> GroupId {
        GroupId::random(&IdentityKey::new([1; 32]))
    }

    fn message(group: GroupId, epoch: u64, needs: Needs, bytes: &[u8]) -> WaitingMessage {
        let arrival = Arrival { at: UnixMillis(epoch), channel: ChannelId::DEFAULT };
        WaitingMessage { group, epoch, needs, arrival, bytes: bytes.to_vec() }
    }

    fn bytes(messages: &[WaitingMessage]) -> Vec<&[u8]> {
        messages.iter().map(|message| &message.bytes[..]).collect()
    }

    #[test]
    fn messages_are_released_by_epoch_and_in_the_order_of_arrival() {
        let (ours, other) = (group(), group());
        let database = Database::in_memory();
        for (group, epoch, bytes) in
            [(ours, 3, b"c"), (ours, 2, b"a"), (other, 1, b"x"), (ours, 2, b"b")]
        {
            add(&database, &message(group, epoch, Needs::Welcome, bytes)).unwrap();
        }
        assert_eq!(release(&database, &ours, 1).unwrap(), []);
        assert_eq!(bytes(&release(&database, &ours, 2).unwrap()), [b"a", b"b"]);
        assert_eq!(release(&database, &ours, 2).unwrap(), []);
        assert_eq!(bytes(&release(&database, &ours, 3).unwrap()), [b"c"]);
        assert_eq!(bytes(&remove_group(&database, &other).unwrap()), [b"x"]);
    }

    #[test]
    fn unknown_groups_displace_no_messages_of_known_ones_and_displaced_messages_are_returned() {
        let known = group();
        let database = Database::in_memory();
        add(&database, &message(known, 2, Needs::Commit, b"needed")).unwrap();
        let mut displaced = Vec::new();
        for number in 0..MAX_MESSAGES + 10 {
            let next = message(group(), 0, Needs::Welcome, &number.to_be_bytes());
            displaced.extend(add(&database, &next).unwrap());
        }
        assert_eq!(displaced.len(), 10);
        assert_eq!(displaced[0].bytes, 0_u64.to_be_bytes(), "the oldest first");
        assert_eq!(bytes(&release(&database, &known, 2).unwrap()), [b"needed"]);
    }

    #[test]
    fn the_bytes_that_wait_are_bounded() {
        let database = Database::in_memory();
        let mut displaced = 0;
        for number in 0..20_u8 {
            let next = message(group(), 0, Needs::Commit, &vec![number; 1024 * 1024]);
            displaced += add(&database, &next).unwrap().len();
        }
        assert_eq!(displaced, 12);
    }

    #[test]
    fn removed_messages_are_returned_once() {
        let database = Database::in_memory();
        for epoch in 0..100 {
            add(&database, &message(group(), epoch, Needs::Welcome, b"x")).unwrap();
        }
        let is_early = |message: &WaitingMessage| message.arrival.at < UnixMillis(70);
        assert_eq!(remove_if(&database, is_early).unwrap().len(), 70);
        assert_eq!(remove_if(&database, is_early).unwrap().len(), 0);
        assert_eq!(Totals::load(&database).unwrap().messages, [30, 0]);
    }
}
