//! The old device: keeps requests, and approves them.

use qpq_domain::{ChannelId, DeviceId, MAX_DEVICES, UnixMillis};
use qpq_mls::database::DatabaseError;
use qpq_proto::{methods, v1};

use super::{
    LinkCode,
    grant::{self, AccountContent, Grant, GrantedConversation, GrantedPerson},
    grant_channel,
    request::{self, Request, is_recent},
    request_channel,
};
use crate::{
    client::{Client, Session, blocking},
    error::{CallError, Error},
    messenger::{
        Messenger,
        log::{EntryId, Event},
        now,
        outbox::fresh_message_id,
        records::Corrupt,
        state::State,
        tables::{CHECKED, LINK_REQUESTS},
    },
    secret::{ExportKey, Password},
};

/// Maximum number of requests that wait. The newest displaces the oldest.
const MAX_WAITING: usize = 8;
/// The id of the entry that announces a request.
const ANNOUNCEMENT: &[u8] = b"link-announced";
/// The time for which the server keeps a grant.
const GRANT_TTL_SECS: u32 = 15 * 60;

/// The request of a new device to be linked to the account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkRequest {
    /// The code, which the new device shows too.
    pub code: LinkCode,
    /// The name that the device sent.
    pub name: String,
    /// The time at which the server accepted the request.
    pub at: UnixMillis,
    request: Request,
}

impl LinkRequest {
    /// Returns the id of the device.
    pub fn device(&self) -> DeviceId {
        self.request.device
    }
}

impl Messenger {
    /// Returns the valid requests to be linked, the oldest first.
    ///
    /// The code of each request takes some 200 ms of one core and 64 MiB.
    pub async fn link_requests(&self) -> Result<Vec<LinkRequest>, Error> {
        let waiting = self.store().change(|state| Ok(state.waiting_links(now())?)).await?;
        let listed = |(at, request): (UnixMillis, Request)| LinkRequest {
            code: request.code(),
            name: request.name.clone(),
            at,
            request,
        };
        Ok(blocking(move || waiting.into_iter().map(listed).collect()).await)
    }

    /// Links the device of a request to the account. May be repeated.
    ///
    /// The caller has checked that the new device shows the code of the request. The password is
    /// necessary, so that no person can link a device on a machine that was left unlocked.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`](crate::AuthError::WrongPassword),
    /// [`Error::LinkRequestExpired`], [`Error::TooManyDevices`], [`Error::NoDevice`].
    pub async fn approve_link(
        &self,
        request: &LinkRequest,
        password: &Password,
    ) -> Result<(), Error> {
        let request = request.request.clone();
        let export_key = self.export_key(password).await?;
        if !request.is_recent(now()) {
            return Err(Error::LinkRequestExpired);
        }
        // A session without a device would be bound to the new one.
        self.ensure_device().await?;
        if self.device_id().await?.is_none() {
            return Err(Error::NoDevice);
        }
        let granted = request.clone();
        let grant = self.store().read(move |state| state.grant(&granted)).await?;
        self.register_linked(&request, &grant).await?;
        let payload = grant.seal(&request, &export_key)?;
        let call = v1::EnqueueRequest {
            recipient_key: self.profile().identity.as_bytes().to_vec().into(),
            payload: payload.into(),
            channel_id: grant_channel(&request.device).as_bytes().to_vec().into(),
            ttl_secs: GRANT_TTL_SECS,
            message_id: fresh_message_id(now()).as_bytes().to_vec().into(),
            ..Default::default()
        };
        self.client().call::<methods::Enqueue>(call).await?;
        self.store().change(move |state| Ok(state.end_link(&request.device)?)).await
    }

    /// Derives the export key by a login that ends immediately. The session of the profile stays.
    async fn export_key(&self, password: &Password) -> Result<ExportKey, Error> {
        let login = self.log_in_again(password).await?;
        let export_key = login.session.export_key.clone();
        login.end().await;
        Ok(export_key)
    }

    /// Logs in on another connection, with another session than that of the profile.
    pub(in crate::messenger) async fn log_in_again(
        &self,
        password: &Password,
    ) -> Result<SecondLogin, Error> {
        let client = Client::new(self.client().options().clone()).map_err(CallError::from)?;
        client.set_device(self.device_id().await?);
        let session = client.login(&self.profile().username, password).await?;
        Ok(SecondLogin { client, session })
    }

    /// Registers the new device.
    async fn register_linked(&self, request: &Request, grant: &Grant) -> Result<(), Error> {
        let call = v1::RegisterDeviceRequest {
            device_id: request.device.as_bytes().to_vec().into(),
            device_name: request.name.clone(),
            device_key: request.key.as_bytes().to_vec().into(),
            device_proof: grant.proof.to_vec().into(),
            ..Default::default()
        };
        match self.client().call::<methods::RegisterDevice>(call).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_code("device.too_many") => {
                Err(Error::TooManyDevices { max: MAX_DEVICES })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// A login in addition to that of the profile: its session is fresh.
pub(in crate::messenger) struct SecondLogin {
    pub(in crate::messenger) client: Client,
    pub(in crate::messenger) session: Session,
}

impl SecondLogin {
    /// Ends the session and the connection.
    pub(in crate::messenger) async fn end(self) {
        if let Err(error) = self.client.end_session(self.session.token).await {
            tracing::debug!(%error, "the session of the password check was not ended");
        }
        self.client.close().await;
    }
}

/// A message of linking that was found in the inbox.
#[derive(Debug)]
pub(in crate::messenger) enum LinkMessage {
    /// A request with a valid signature.
    Request(Box<Request>),
    /// A request without a valid signature, or a grant. A grant is for a device that reads the
    /// inbox by itself.
    Other,
}

impl State {
    /// Reads a message of linking; `None` if it is another message.
    pub(in crate::messenger) fn link_message(
        &self,
        channel: ChannelId,
        data: &[u8],
    ) -> Option<LinkMessage> {
        if channel == request_channel(&self.me())
            && let Some(bytes) = data.strip_prefix(request::PREFIX)
        {
            let request = Request::read(bytes).map(Box::new);
            return Some(request.map_or(LinkMessage::Other, LinkMessage::Request));
        }
        data.starts_with(grant::PREFIX).then_some(LinkMessage::Other)
    }

    /// Notes a request that the server accepted a short time ago, and announces it.
    pub(in crate::messenger) fn note_link_message(
        &self,
        message: LinkMessage,
        at: UnixMillis,
        now: UnixMillis,
    ) -> Result<(), DatabaseError> {
        let LinkMessage::Request(request) = message else { return Ok(()) };
        if !is_recent(at, now) || self.is_own_device(&request.device) {
            return Ok(());
        }
        let row = [&at.0.to_be_bytes()[..], request.bytes()].concat();
        self.database().put(LINK_REQUESTS, request.device.as_bytes(), None, &row)?;
        let waiting = self.waiting_links(now)?;
        let too_many = waiting.len().saturating_sub(MAX_WAITING);
        for (_, displaced) in &waiting[..too_many] {
            self.database().delete(LINK_REQUESTS, displaced.device.as_bytes())?;
        }
        let announced = match self.number(ANNOUNCEMENT)? {
            Some(entry) => self.log.get(EntryId(entry))?.is_some_and(|kept| !kept.seen),
            None => false,
        };
        if !announced {
            let name = request.name;
            let entry = self.log.push(None, at, Event::DeviceRequested { name })?;
            self.set_number(ANNOUNCEMENT, Some(entry.0))?;
        }
        Ok(())
    }

    fn is_own_device(&self, device: &DeviceId) -> bool {
        self.mls.device().is_some_and(|own| own.id() == *device)
    }

    /// Returns the valid requests with the times of their arrival, the oldest first. Removes the
    /// others.
    fn waiting_links(&self, now: UnixMillis) -> Result<Vec<(UnixMillis, Request)>, DatabaseError> {
        let is_over = |row: &[u8]| !arrived_at(row).is_some_and(|at| is_recent(at, now));
        self.database().delete_where(LINK_REQUESTS, is_over)?;
        let rows = self.database().all(LINK_REQUESTS)?;
        let mut waiting = rows.iter().map(|row| read(row)).collect::<Result<Vec<_>, _>>()?;
        waiting.sort_by_key(|(at, request)| (*at, request.device));
        Ok(waiting)
    }

    /// Removes an approved request, and lets this account's devices be checked again.
    ///
    /// This device then adds the new one to each conversation that it has not joined, before the
    /// next message to the conversation.
    fn end_link(&self, device: &DeviceId) -> Result<(), DatabaseError> {
        self.database().delete(LINK_REQUESTS, device.as_bytes())?;
        self.database().delete(CHECKED, self.me().as_bytes())?;
        self.note_other_devices()
    }

    /// Collects the content of the grant for a new device.
    fn grant(&self, request: &Request) -> Result<Grant, Error> {
        let account = self.account_content()?;
        let proof = account.identity.certify(&request.device, &request.key);
        Ok(Grant { proof, account })
    }

    /// Collects the content of the account that a new device receives.
    pub(in crate::messenger) fn account_content(&self) -> Result<AccountContent, Error> {
        let identity = self.mls.identity().clone();
        let mut conversations = Vec::new();
        for group in self.mls.groups()?.into_iter().filter(|group| group.active) {
            let known = self.server_group(&group.id)?;
            conversations.push(GrantedConversation {
                channel: known.map_or(group.channel, |known| known.channel),
                members: group.members.iter().map(|member| member.identity).collect(),
            });
        }
        let mut people = Vec::new();
        for (identity, known) in self.people.all()? {
            let is_acquainted = self.is_acquainted(&identity)?;
            people.push(GrantedPerson { identity, known, is_acquainted });
        }
        let blocked = self.blocked()?.into_iter().collect();
        Ok(AccountContent { identity, conversations, people, blocked })
    }
}

fn arrived_at(row: &[u8]) -> Option<UnixMillis> {
    Some(UnixMillis(u64::from_be_bytes(*row.first_chunk()?)))
}

fn read(row: &[u8]) -> Result<(UnixMillis, Request), DatabaseError> {
    let at = arrived_at(row).ok_or_else(|| Corrupt::new("a request is cut short"))?;
    let request = Request::read(&row[8..]).ok_or_else(|| Corrupt::new("a request is invalid"))?;
    Ok((at, request))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use qpq_domain::Username;
    use qpq_mls::{Device, Identity, database::Database};

    use super::{super::LINK_REQUEST_LIFETIME, *};

    const START: UnixMillis = UnixMillis(1_800_000_000_000);

    fn state() -> State {
        let name = Username::parse("alice").unwrap();
        State::create(&Database::in_memory(), Identity::generate(), name).unwrap()
    }

    fn request(n: u8, at: UnixMillis) -> Request {
        let device = Device::new(DeviceId::new([n; 16]), "laptop", &[n; 32], [0; 64]);
        Request::create(&device, &[3; 32], at)
    }

    fn note(state: &State, request: &Request, now: UnixMillis) {
        let channel = request_channel(&state.me());
        let message = state.link_message(channel, &request.message()).unwrap();
        state.note_link_message(message, request.created_at, now).unwrap();
    }

    fn waiting(state: &State, now: UnixMillis) -> Vec<u8> {
        let waiting = state.waiting_links(now).unwrap();
        waiting.iter().map(|(_, request)| request.device.as_bytes()[0]).collect()
    }

    #[test]
    fn requests_expire_after_their_lifetime_and_the_newest_displace_the_oldest() {
        let state = state();
        for n in 1..=10 {
            note(&state, &request(n, START.plus(Duration::from_secs(n.into()))), START);
        }
        assert_eq!(waiting(&state, START), [3, 4, 5, 6, 7, 8, 9, 10]);
        let later = START.plus(LINK_REQUEST_LIFETIME + Duration::from_secs(5));
        assert_eq!(waiting(&state, later), [5, 6, 7, 8, 9, 10]);
        assert!(waiting(&state, later.plus(LINK_REQUEST_LIFETIME)).is_empty());
        note(&state, &request(1, START), later);
        assert!(waiting(&state, later).is_empty(), "it came too late");
    }

    #[test]
    fn further_requests_have_no_entry_while_one_is_unseen() {
        let state = state();
        let entries = || state.log.unseen(None, 10).unwrap();
        note(&state, &request(1, START), START);
        note(&state, &request(2, START), START);
        let [entry] = &entries()[..] else { panic!("{:?}", entries()) };
        assert_eq!(entry.event, Event::DeviceRequested { name: "laptop".into() });
        state.log.mark_seen(&[entry.id]).unwrap();
        note(&state, &request(3, START), START);
        assert_eq!(entries().len(), 1);
    }

    #[test]
    fn a_request_with_an_invalid_signature_is_dropped() {
        let state = state();
        let mut message = request(1, START).message();
        *message.last_mut().unwrap() ^= 1;
        let channel = request_channel(&state.me());
        let found = state.link_message(channel, &message).unwrap();
        assert!(matches!(found, LinkMessage::Other), "{found:?}");
        state.note_link_message(found, START, START).unwrap();
        assert!(waiting(&state, START).is_empty());
        assert!(state.log.unseen(None, 10).unwrap().is_empty());
        // On another channel the message is not a request.
        assert!(state.link_message(ChannelId::DEFAULT, &request(1, START).message()).is_none());
    }
}
