//! Welcomes of strangers, which wait until they are accepted or declined.
//!
//! A request keeps the Welcome and the KeyPackage for which the Welcome was created, so the group
//! can be joined at any later time. Messages to the group are kept with it.
//!
//! Requests and their messages are bounded: for each stranger, in total, and in bytes. Above a
//! bound, the stranger with the most requests loses its oldest one, and the group with the most
//! messages loses its oldest one. Dropped requests and messages are counted. A request costs one
//! insertion: no work or row grows with the number of earlier requests.

use qpq_domain::{ChannelId, IdentityKey, UnixMillis};

use crate::{
    codec::{Malformed, Reader, Writer},
    database::{Database, DatabaseError, Item, Measure, NewItem},
    identity::Member,
    packages::Package,
    profile::{GroupId, GroupKind},
    received::{Arrival, Request},
    tables::{DECLINED, REQUEST_MESSAGES, REQUESTS},
    waiting::WaitingMessage,
};

/// The maximum number of requests of one person.
pub const MAX_REQUESTS_EACH: u64 = 10;
/// The maximum number of requests in total.
pub const MAX_REQUESTS: u64 = 200;
/// The maximum size of all requests, in bytes.
const MAX_BYTES: u64 = 8 * 1024 * 1024;
/// The maximum number of messages that wait with all requests.
const MAX_MESSAGES: u64 = 256;
/// The maximum size of these messages, in bytes.
const MAX_MESSAGE_BYTES: u64 = 8 * 1024 * 1024;
/// The number of groups that are remembered after their request was declined or dropped. Messages
/// to these have no effect.
const MAX_DECLINED: u64 = 1_024;

/// The row that counts dropped requests. Group ids have another length.
const DROPPED: &[u8] = b"dropped";

/// A request, with the KeyPackage and the Welcome by which its group is joined.
pub(crate) struct Kept {
    pub(crate) request: Request,
    pub(crate) package: Package,
    pub(crate) welcome: Vec<u8>,
}

/// Saves a request, in place of an earlier one for the same group.
pub(crate) fn keep(
    database: &Database,
    request: &Request,
    package: &Package,
    welcome: &[u8],
) -> Result<(), DatabaseError> {
    let group = request.group.as_bytes();
    for table in [REQUESTS, DECLINED] {
        if let Some(earlier) = database.number_of_key(table, group)? {
            database.remove_item(table, earlier)?;
        }
    }
    let inviter = request.inviter.identity;
    let new = NewItem { key: Some(group), lane: Some(inviter.as_bytes()), open: true };
    database.append(REQUESTS, new, encode(request, package, welcome).written())?;
    if database.count_open(REQUESTS, inviter.as_bytes())? > MAX_REQUESTS_EACH
        && let Some(oldest) = database.first_in_lane(REQUESTS, inviter.as_bytes())?
    {
        drop_request(database, &oldest)?;
    }
    loop {
        let size = database.size_of_items(REQUESTS)?;
        let measure = match size.items > MAX_REQUESTS {
            true => Measure::Items,
            false if size.bytes > MAX_BYTES => Measure::Bytes,
            false => return Ok(()),
        };
        let Some(oldest) = database.first_in_largest_lane(REQUESTS, measure)? else {
            return Ok(());
        };
        drop_request(database, &oldest)?;
    }
}

/// Returns every request, the oldest first.
pub(crate) fn all(database: &Database) -> Result<Vec<Request>, DatabaseError> {
    let items = database.open_items(REQUESTS, None, u32::MAX)?;
    items
        .iter()
        .map(|item| {
            let request = parse(item)?.request;
            let missed = count(database, request.group.as_bytes())?;
            Ok(Request { missed, ..request })
        })
        .collect()
}

/// Returns the number of dropped requests since the last time that no request waited.
pub(crate) fn dropped(database: &Database) -> Result<u64, DatabaseError> {
    count(database, DROPPED)
}

/// Returns the request for a group.
pub(crate) fn get(database: &Database, group: &GroupId) -> Result<Option<Kept>, DatabaseError> {
    let Some(item) = database.item_of_key(REQUESTS, group.as_bytes())? else { return Ok(None) };
    let mut kept = parse(&item)?;
    kept.request.missed = count(database, group.as_bytes())?;
    Ok(Some(kept))
}

/// Returns whether there is a request for a group.
pub(crate) fn waits(database: &Database, group: &GroupId) -> Result<bool, DatabaseError> {
    Ok(database.number_of_key(REQUESTS, group.as_bytes())?.is_some())
}

/// Returns whether a group is one of the last whose request was declined or dropped.
pub(crate) fn was_declined(database: &Database, group: &GroupId) -> Result<bool, DatabaseError> {
    Ok(database.number_of_key(DECLINED, group.as_bytes())?.is_some())
}

/// Removes the request for a group that is joined now; returns the messages that waited with it, in
/// the order of arrival.
pub(crate) fn accepted(
    database: &Database,
    group: &GroupId,
) -> Result<Vec<WaitingMessage>, DatabaseError> {
    let items = database.in_lane_ascending(REQUEST_MESSAGES, group.as_bytes())?;
    let messages = items.iter().map(parse_message).collect::<Result<_, _>>()?;
    remove(database, group)?;
    Ok(messages)
}

/// Removes the request for a group, and its messages; returns whether there was one.
pub(crate) fn decline(database: &Database, group: &GroupId) -> Result<bool, DatabaseError> {
    let is_removed = remove(database, group)?;
    if is_removed {
        remember(database, group)?;
    }
    Ok(is_removed)
}

/// Declines all requests of a person.
pub(crate) fn decline_all(database: &Database, inviter: &IdentityKey) -> Result<(), DatabaseError> {
    for item in database.in_lane_ascending(REQUESTS, inviter.as_bytes())? {
        decline(database, &parse(&item)?.request.group)?;
    }
    Ok(())
}

/// Keeps a message to a group that waits as a request.
pub(crate) fn keep_message(
    database: &Database,
    message: &WaitingMessage,
) -> Result<(), DatabaseError> {
    let new = NewItem { lane: Some(message.group.as_bytes()), open: true, key: None };
    database.append(REQUEST_MESSAGES, new, message.encode().written())?;
    loop {
        let size = database.size_of_items(REQUEST_MESSAGES)?;
        let measure = match size.items > MAX_MESSAGES {
            true => Measure::Items,
            false if size.bytes > MAX_MESSAGE_BYTES => Measure::Bytes,
            false => return Ok(()),
        };
        let Some(oldest) = database.first_in_largest_lane(REQUEST_MESSAGES, measure)? else {
            return Ok(());
        };
        let group = parse_message(&oldest)?.group;
        database.remove_item(REQUEST_MESSAGES, oldest.number)?;
        let missed = count(database, group.as_bytes())? + 1;
        database.put(REQUESTS, group.as_bytes(), None, &missed.to_be_bytes())?;
    }
}

fn remove(database: &Database, group: &GroupId) -> Result<bool, DatabaseError> {
    let Some(number) = database.number_of_key(REQUESTS, group.as_bytes())? else {
        return Ok(false);
    };
    database.remove_item(REQUESTS, number)?;
    database.remove_items_in_lane(REQUEST_MESSAGES, group.as_bytes())?;
    database.delete(REQUESTS, group.as_bytes())?;
    if database.size_of_items(REQUESTS)?.items == 0 {
        database.delete(REQUESTS, DROPPED)?;
    }
    Ok(true)
}

fn drop_request(database: &Database, item: &Item) -> Result<(), DatabaseError> {
    let dropped = dropped(database)? + 1;
    decline(database, &parse(item)?.request.group)?;
    database.put(REQUESTS, DROPPED, None, &dropped.to_be_bytes())
}

/// Remembers that messages to a group have no effect, and forgets the oldest such group above the
/// bound.
fn remember(database: &Database, group: &GroupId) -> Result<(), DatabaseError> {
    let new = NewItem { key: Some(group.as_bytes()), ..NewItem::default() };
    let number = database.append(DECLINED, new, b"")?;
    match number.checked_sub(MAX_DECLINED) {
        Some(oldest) => database.remove_item(DECLINED, oldest),
        None => Ok(()),
    }
}

fn count(database: &Database, key: &[u8]) -> Result<u64, DatabaseError> {
    let Some(row) = database.get(REQUESTS, key)? else { return Ok(0) };
    row[..].try_into().map(u64::from_be_bytes).map_err(|_| damaged())
}

fn encode(request: &Request, package: &Package, welcome: &[u8]) -> Writer {
    let package = package.encode();
    let name = request.inviter.username.as_str();
    let label = match &request.kind {
        GroupKind::Direct { peer } => &peer.as_bytes()[..],
        GroupKind::Group { name } => name.as_bytes(),
    };
    let len = 256 + label.len() + name.len() + package.written().len() + welcome.len();
    let mut writer = Writer::with_capacity(len);
    writer.raw(request.group.as_bytes());
    writer.raw(&[u8::from(matches!(request.kind, GroupKind::Group { .. }))]);
    writer.bytes(label);
    request.inviter.write(&mut writer);
    writer.count(request.members);
    writer.number(request.epoch);
    writer.number(request.arrival.at.0);
    writer.bytes(request.arrival.channel.as_bytes());
    writer.bytes(package.written());
    writer.bytes(welcome);
    writer
}

fn parse(item: &Item) -> Result<Kept, DatabaseError> {
    read(&mut Reader::new(&item.value)).map_err(|Malformed| damaged())
}

fn read(reader: &mut Reader<'_>) -> Result<Kept, Malformed> {
    let group = GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?;
    let is_group = reader.array()? == [1];
    let label = reader.bytes()?;
    let kind = if is_group {
        GroupKind::Group { name: std::str::from_utf8(label).map_err(|_| Malformed)?.to_owned() }
    } else {
        GroupKind::Direct { peer: IdentityKey::try_from(label).map_err(|_| Malformed)? }
    };
    let request = Request {
        group,
        kind,
        inviter: Member::from_reader(reader)?,
        members: usize::try_from(reader.number()?).map_err(|_| Malformed)?,
        epoch: reader.number()?,
        arrival: Arrival {
            at: UnixMillis(reader.number()?),
            channel: ChannelId::try_from(reader.bytes()?).map_err(|_| Malformed)?,
        },
        missed: 0,
    };
    let package = Package::read(&mut Reader::new(reader.bytes()?))?;
    Ok(Kept { request, package, welcome: reader.bytes()?.to_vec() })
}

fn parse_message(item: &Item) -> Result<WaitingMessage, DatabaseError> {
    WaitingMessage::read(&mut Reader::new(&item.value)).map_err(|Malformed| damaged())
}

fn damaged() -> DatabaseError {
    DatabaseError::Damaged("a request is cut short".into())
}

#[cfg(test)]
mod tests {
    use qpq_domain::Username;

    use super::*;
    use crate::{identity::Identity, packages, waiting::Needs};

    const AT: Arrival = Arrival { at: UnixMillis(7), channel: ChannelId::DEFAULT };

    /// Returns a database, and one of its KeyPackages.
    fn database() -> (Database, Package) {
        let database = Database::in_memory();
        let name = Username::parse("bob").unwrap();
        let once = packages::Use::Once;
        let leaf = crate::leaf::LeafSigner::of_account(&Identity::generate(), &name);
        packages::create(&database, &leaf, once, UnixMillis(0)).unwrap();
        let row = database.all(crate::tables::PACKAGES).unwrap().pop().unwrap();
        let package = Package::read(&mut Reader::new(&row)).ok().unwrap();
        (database, package)
    }

    fn request(stranger: u32, epoch: u64) -> Request {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&stranger.to_be_bytes());
        let identity = IdentityKey::new(key);
        let username = Username::parse("mallory").unwrap();
        Request {
            group: GroupId::random(&identity),
            kind: GroupKind::Group { name: "offer".into() },
            inviter: Member { identity, username },
            members: 2,
            epoch,
            arrival: AT,
            missed: 0,
        }
    }

    fn message(group: GroupId, bytes: &[u8]) -> WaitingMessage {
        WaitingMessage {
            group,
            epoch: 1,
            needs: Needs::Welcome,
            arrival: AT,
            bytes: bytes.to_vec(),
        }
    }

    fn bytes(database: &Database) -> u64 {
        [REQUESTS, REQUEST_MESSAGES, DECLINED]
            .map(|table| database.size_of_items(table).unwrap().bytes)
            .iter()
            .sum()
    }

    #[test]
    fn the_requests_of_one_stranger_are_bounded_and_the_dropped_ones_are_counted() {
        let (database, package) = database();
        let mut kept = Vec::new();
        let mut sizes = Vec::new();
        for number in 0..10_000 {
            let request = request(1, number);
            keep(&database, &request, &package, &[1; 500]).unwrap();
            keep_message(&database, &message(request.group, b"join us")).unwrap();
            kept.push(request);
            if number % 2_000 == 1_999 {
                sizes.push(bytes(&database));
            }
        }
        let waiting = all(&database).unwrap();
        assert_eq!(waiting, kept[9_990..], "the newest, oldest first");
        assert_eq!(dropped(&database).unwrap(), 9_990);
        assert_eq!(
            database.size_of_items(REQUEST_MESSAGES).unwrap().items,
            10,
            "dropped with their requests"
        );
        assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
        assert!(was_declined(&database, &kept[9_989].group).unwrap());
        for request in &kept[9_990..] {
            assert!(decline(&database, &request.group).unwrap());
        }
        assert_eq!((all(&database).unwrap().len(), dropped(&database).unwrap()), (0, 0));
    }

    #[test]
    fn one_of_many_strangers_is_dropped_last_if_it_has_the_fewest_requests() {
        let (database, package) = database();
        let modest = request(0, 0);
        keep(&database, &modest, &package, b"w").unwrap();
        for number in 0..10_000_u32 {
            let request = request(1 + number % 100, 0);
            keep(&database, &request, &package, b"w").unwrap();
        }
        let waiting = all(&database).unwrap();
        assert_eq!(waiting.len(), usize::try_from(MAX_REQUESTS).unwrap());
        assert_eq!(dropped(&database).unwrap(), 10_001 - MAX_REQUESTS);
        assert_eq!(waiting[0], modest);
        // Large requests displace requests of their own sender.
        for _ in 0..MAX_REQUESTS_EACH {
            keep(&database, &request(101, 0), &package, &vec![0; 1024 * 1024]).unwrap();
        }
        assert!(database.size_of_items(REQUESTS).unwrap().bytes <= MAX_BYTES);
        assert!(waits(&database, &modest.group).unwrap());
        assert!(all(&database).unwrap().len() > 190);
    }

    #[test]
    fn a_later_welcome_replaces_the_request_and_its_messages_stay() {
        let (database, package) = database();
        let first = request(1, 1);
        keep(&database, &first, &package, b"one").unwrap();
        keep_message(&database, &message(first.group, b"hi")).unwrap();
        let second = Request { epoch: 2, ..first.clone() };
        keep(&database, &second, &package, b"two").unwrap();
        let found = get(&database, &first.group).unwrap().unwrap();
        assert_eq!((found.request, &found.welcome[..]), (second, &b"two"[..]));
        assert_eq!(accepted(&database, &first.group).unwrap().len(), 1);
        assert!(!waits(&database, &first.group).unwrap());
        assert!(!was_declined(&database, &first.group).unwrap());

        decline(&database, &first.group).unwrap();
        assert!(!was_declined(&database, &first.group).unwrap(), "there was none");
        keep(&database, &first, &package, b"one").unwrap();
        assert!(decline(&database, &first.group).unwrap());
        assert!(was_declined(&database, &first.group).unwrap());
        keep(&database, &first, &package, b"one").unwrap();
        assert!(!was_declined(&database, &first.group).unwrap(), "it is a request again");
    }

    #[test]
    fn the_messages_that_wait_are_bounded_and_the_largest_group_loses_the_oldest() {
        let (database, package) = database();
        let (modest, greedy) = (request(1, 0), request(2, 0));
        for request in [&modest, &greedy] {
            keep(&database, request, &package, b"w").unwrap();
        }
        keep_message(&database, &message(modest.group, b"hello")).unwrap();
        for number in 0..1_000_u32 {
            keep_message(&database, &message(greedy.group, &number.to_be_bytes())).unwrap();
        }
        keep_message(&database, &message(greedy.group, &vec![0; 8 * 1024 * 1024])).unwrap();
        assert_eq!(get(&database, &modest.group).unwrap().unwrap().request.missed, 0);
        assert_eq!(get(&database, &greedy.group).unwrap().unwrap().request.missed, 1_001);
        assert_eq!(accepted(&database, &modest.group).unwrap()[0].bytes, b"hello");
        assert_eq!(accepted(&database, &greedy.group).unwrap().len(), 0);
    }
}
