//! Decisions about people and requests, which the account's other devices adopt.
//!
//! A device that accepts a request, writes to a person, compares a safety number or blocks an
//! account sends a *decision* to the account's own inbox: sealed with a key that only the account
//! can derive, on a channel of its own, as markers are. The outbox keeps the decision until the
//! server has it.
//!
//! A revoked device knows the key. Therefore a decision never changes which key a name belongs to.

use std::time::Duration;

use prost::Message as _;
use qpq_domain::{ChannelId, DeviceId, IdentityKey, UnixMillis, Username};
use qpq_mls::{GroupId, Parcel, database::DatabaseError, vault};

use super::{
    Messenger,
    marker::{account_channel, account_key},
    now,
    people::Standing,
    records::{Corrupt, decode},
    state::State,
};
use crate::{error::Error, link::ConnectionEvent};

const KEY: &[u8] = b"qpq/decision-key/1";
const CHANNEL: &[u8] = b"qpq/decision-channel/1";
/// The age from which a decision is ignored. A younger one is recognized if the server delivers it
/// twice.
const LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(bytes = "vec", tag = "1")]
    device: Vec<u8>,
    /// Unix milliseconds, by the clock of the device.
    #[prost(uint64, tag = "2")]
    at: u64,
    #[prost(oneof = "Content", tags = "3, 4, 5, 6, 7, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(bytes = "vec", tag = "3")]
    Met(Vec<u8>),
    #[prost(bytes = "vec", tag = "4")]
    Accepted(Vec<u8>),
    #[prost(bytes = "vec", tag = "5")]
    Declined(Vec<u8>),
    #[prost(bytes = "vec", tag = "6")]
    Blocked(Vec<u8>),
    #[prost(bytes = "vec", tag = "7")]
    Unblocked(Vec<u8>),
    #[prost(message, tag = "8")]
    Compared(Compared),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Compared {
    #[prost(bytes = "vec", tag = "1")]
    identity: Vec<u8>,
    #[prost(string, tag = "2")]
    username: String,
    #[prost(uint64, tag = "3")]
    at: u64,
}

/// A decision of this account's user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// The person is an acquaintance.
    Met(IdentityKey),
    /// The request was accepted.
    Accepted(GroupId),
    /// The request was declined.
    Declined(GroupId),
    /// Messages of the person are refused.
    Blocked(IdentityKey),
    /// Messages of the person are accepted again.
    Unblocked(IdentityKey),
    /// The safety number with the person was compared.
    Compared { identity: IdentityKey, username: Username, at: UnixMillis },
}

impl From<&Decision> for Content {
    fn from(decision: &Decision) -> Self {
        match decision {
            Decision::Met(identity) => Self::Met(identity.as_bytes().to_vec()),
            Decision::Accepted(request) => Self::Accepted(request.as_bytes().to_vec()),
            Decision::Declined(request) => Self::Declined(request.as_bytes().to_vec()),
            Decision::Blocked(identity) => Self::Blocked(identity.as_bytes().to_vec()),
            Decision::Unblocked(identity) => Self::Unblocked(identity.as_bytes().to_vec()),
            Decision::Compared { identity, username, at } => Self::Compared(Compared {
                identity: identity.as_bytes().to_vec(),
                username: username.to_string(),
                at: at.0,
            }),
        }
    }
}

impl Content {
    fn read(&self) -> Result<Decision, Corrupt> {
        let person = |bytes: &[u8]| IdentityKey::try_from(bytes).map_err(Corrupt::new);
        let request = |bytes: &[u8]| GroupId::try_from(bytes).map_err(Corrupt::new);
        Ok(match self {
            Self::Met(bytes) => Decision::Met(person(bytes)?),
            Self::Accepted(bytes) => Decision::Accepted(request(bytes)?),
            Self::Declined(bytes) => Decision::Declined(request(bytes)?),
            Self::Blocked(bytes) => Decision::Blocked(person(bytes)?),
            Self::Unblocked(bytes) => Decision::Unblocked(person(bytes)?),
            Self::Compared(compared) => Decision::Compared {
                identity: person(&compared.identity)?,
                username: Username::parse(&compared.username).map_err(Corrupt::new)?,
                at: UnixMillis(compared.at),
            },
        })
    }
}

impl Messenger {
    /// Sends the decisions in the outbox, if there is a connection. Otherwise they are sent later.
    pub(super) async fn send_decisions(&self) {
        let is_connected = matches!(
            *self.client().connection_events().borrow(),
            ConnectionEvent::Connected { .. }
        );
        if is_connected && let Err(error) = self.flush().await {
            tracing::debug!(%error, "decision not sent, retrying later");
        }
    }
}

impl State {
    /// Notes that the user wrote to a person or added the person, now an acquaintance.
    pub(super) fn note_contact(&self, identity: &IdentityKey) -> Result<(), DatabaseError> {
        if self.is_acquainted(identity)? {
            return Ok(());
        }
        self.note_acquaintance(identity)?;
        self.share(&Decision::Met(*identity))
    }

    /// Puts a decision into the outbox, if the account has other devices.
    pub(super) fn share(&self, decision: &Decision) -> Result<(), DatabaseError> {
        let Some(device) = self.mls.device().map(qpq_mls::Device::id) else { return Ok(()) };
        if !self.has_other_devices()? {
            return Ok(());
        }
        let content = Encoded {
            device: device.as_bytes().to_vec(),
            at: now().0,
            content: Some(decision.into()),
        };
        let key = account_key(self.mls.identity(), KEY);
        let parcel = Parcel {
            recipients: vec![self.me()],
            channel: self.decision_channel(),
            payload: vault::seal(&key, &content.encode_to_vec()),
        };
        self.outbox.push(parcel, None, now())
    }

    /// Returns the channel of the account's decisions.
    pub(super) fn decision_channel(&self) -> ChannelId {
        account_channel(self.mls.identity(), CHANNEL)
    }

    /// Adopts a message on the channel of decisions, if it is a decision of another device.
    pub(super) fn adopt_decision(&mut self, message: &[u8], now: UnixMillis) -> Result<(), Error> {
        match self.open_decision(message, now) {
            Some(decision) => self.adopt(decision),
            None => Ok(()),
        }
    }

    fn open_decision(&self, message: &[u8], now: UnixMillis) -> Option<Decision> {
        let content = vault::open(&account_key(self.mls.identity(), KEY), message).ok()?;
        let encoded = decode::<Encoded>(&content).ok()?;
        let device = DeviceId::try_from(&encoded.device[..]).ok()?;
        let is_own = self.mls.device().is_some_and(|own| own.id() == device);
        let is_old = UnixMillis(encoded.at).plus(LIFETIME) < now;
        let content = encoded.content.filter(|_| !is_own && !is_old)?;
        content.read().ok()
    }

    fn adopt(&mut self, decision: Decision) -> Result<(), Error> {
        match decision {
            Decision::Met(identity) => self.note_acquaintance(&identity)?,
            Decision::Accepted(request) => match self.accept(&request) {
                // The request was also accepted or declined here.
                Err(Error::NoSuchRequest) => {}
                done => drop(done?),
            },
            Decision::Declined(request) => {
                self.mls.decline(&request)?;
            }
            Decision::Blocked(identity) => self.block(&identity)?,
            Decision::Unblocked(identity) => {
                self.unblock(&identity)?;
            }
            Decision::Compared { identity, username, at } => {
                self.note_acquaintance(&identity)?;
                if !self.people.is_named(&identity)? {
                    self.people.claim(identity, &username)?;
                }
                let person = self.people.person(&identity)?;
                let is_credible =
                    matches!(person.standing, Standing::Claimed | Standing::Confirmed);
                if is_credible && person.username == username {
                    self.people.set_compared(&identity, at)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use qpq_mls::{Device, Identity, database::Database};

    use super::*;

    const BOB: IdentityKey = IdentityKey::new([7; 32]);

    /// Two devices of an account.
    fn devices() -> [State; 2] {
        let identity = Identity::generate();
        [1, 2].map(|_| {
            let name = Username::parse("alice").unwrap();
            let mut state = State::create(&Database::in_memory(), identity.clone(), name).unwrap();
            let device = Device::generate(&identity, "device");
            state.mls.set_device(device).unwrap();
            state.note_other_devices().unwrap();
            state
        })
    }

    /// Returns the messages in the outbox.
    fn sent(state: &State) -> Vec<Vec<u8>> {
        let (mut sent, mut from) = (Vec::new(), None);
        let end = state.outbox.end().unwrap();
        while let Some((place, item)) = state.outbox.next(from, end).unwrap() {
            assert_eq!(
                (&item.recipients[..], item.channel),
                (&[state.me()][..], state.decision_channel())
            );
            sent.push(item.payload);
            from = Some(place);
        }
        sent
    }

    #[test]
    fn decisions_are_adopted_only_by_other_devices_of_the_account() {
        let [one, mut other] = devices();
        let bob = Username::parse("bob").unwrap();
        one.note_contact(&BOB).unwrap();
        one.note_contact(&BOB).unwrap();
        one.share(&Decision::Compared { identity: BOB, username: bob, at: UnixMillis(5) }).unwrap();
        one.share(&Decision::Blocked(BOB)).unwrap();
        one.share(&Decision::Unblocked(BOB)).unwrap();
        let [met, compared, blocked, unblocked] = &sent(&one)[..] else { panic!("four were made") };
        other.adopt_decision(met, now()).unwrap();
        assert!(other.is_acquainted(&BOB).unwrap());
        other.adopt_decision(compared, now()).unwrap();
        assert_eq!(other.people.compared_at(&BOB).unwrap(), Some(UnixMillis(5)));
        other.adopt_decision(blocked, now()).unwrap();
        assert!(other.is_blocked(&BOB).unwrap());
        other.adopt_decision(unblocked, now()).unwrap();
        assert!(!other.is_blocked(&BOB).unwrap());
        assert!(sent(&other).is_empty(), "what is adopted is not sent on");

        let [mut stranger, _] = devices();
        stranger.adopt_decision(met, now()).unwrap();
        assert!(!stranger.is_acquainted(&BOB).unwrap());
    }

    #[test]
    fn an_old_decision_and_one_of_this_device_are_ignored() {
        let [mut one, mut other] = devices();
        one.share(&Decision::Blocked(BOB)).unwrap();
        let [blocked] = &sent(&one)[..] else { panic!("one was made") };
        other.adopt_decision(blocked, now().plus(LIFETIME + Duration::from_secs(60))).unwrap();
        assert!(!other.is_blocked(&BOB).unwrap());
        one.adopt_decision(blocked, now()).unwrap();
        assert!(!one.is_blocked(&BOB).unwrap());
    }

    #[test]
    fn a_decision_does_not_confirm_a_key_that_the_directory_refuted() {
        let [one, mut other] = devices();
        let bob = Username::parse("bob").unwrap();
        let compared =
            Decision::Compared { identity: BOB, username: bob.clone(), at: UnixMillis(5) };
        one.share(&compared).unwrap();
        for standing in [Standing::Refuted, Standing::NewKey] {
            other.people.set(BOB, bob.clone(), standing).unwrap();
            other.adopt_decision(&sent(&one)[0], now()).unwrap();
            assert_eq!(other.people.compared_at(&BOB).unwrap(), None);
            assert_eq!(other.people.person(&BOB).unwrap().standing, standing);
        }
    }

    #[test]
    fn a_decision_does_not_change_the_name_of_a_key() {
        let [one, mut other] = devices();
        let [bob, eve] = ["bob", "eve"].map(|name| Username::parse(name).unwrap());
        one.share(&Decision::Compared { identity: BOB, username: eve, at: UnixMillis(5) }).unwrap();
        other.people.set(BOB, bob.clone(), Standing::Confirmed).unwrap();
        other.adopt_decision(&sent(&one)[0], now()).unwrap();
        let person = other.people.person(&BOB).unwrap();
        assert_eq!((person.username, person.standing), (bob, Standing::Confirmed));
        assert_eq!(other.people.compared_at(&BOB).unwrap(), None);
    }

    #[test]
    fn an_account_with_one_device_sends_no_decisions() {
        let name = Username::parse("alice").unwrap();
        let identity = Identity::generate();
        let mut state = State::create(&Database::in_memory(), identity.clone(), name).unwrap();
        state.mls.set_device(Device::generate(&identity, "device")).unwrap();
        state.note_contact(&BOB).unwrap();
        assert!(sent(&state).is_empty());
    }
}
