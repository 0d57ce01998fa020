//! The new device: asks to be linked, waits for the grant, and creates its profile.

use std::{path::Path, sync::Arc, time::Duration};

use qpq_domain::{DeviceId, IdentityKey, Seq, Username};
use qpq_mls::{
    Device,
    database::{Database, DatabaseError},
    sealed::SealingKeyPair,
    vault::Salt,
};
use qpq_proto::{methods, v1};
use rand::{RngCore as _, rngs::OsRng};
use tokio::time::{Instant, sleep, timeout_at};
use zeroize::Zeroizing;

use super::{
    LINK_REQUEST_LIFETIME, LinkCode,
    grant::{self, AccountContent, Grant},
    grant_channel, interrupted,
    request::Request,
    request_channel,
};
use crate::{
    client::{Client, Session, blocking},
    error::{CallError, Error, ProfileError},
    link::Live,
    messenger::{
        Messenger,
        changes::Operation,
        devices::check_name,
        directory::is_not_found,
        inbox::NewKeys,
        marker::LINKED,
        now,
        open::{assemble, derive, discard},
        outbox::fresh_message_id,
        page::LAST_SEQ,
        state::{LEGACY_CURSOR, State},
        store::StateStore,
        tables::BLOCKED,
    },
    options::{Options, Trust},
    profile::{self, InUse, Profile, ProfileStatus},
    secret::Password,
};

/// The interval of reads of the inbox.
const POLL: Duration = Duration::from_secs(1);
/// Maximum number of messages in a page.
const PAGE: u32 = 200;
/// Maximum number of pages of one read.
const MAX_PAGES: usize = 1_000;

/// A device that waits to be linked to an account. Until then only its id is saved.
#[derive(Debug)]
pub struct Linking {
    in_use: InUse,
    client: Client,
    session: Session,
    username: Username,
    identity: IdentityKey,
    device_seed: Zeroizing<[u8; 32]>,
    keys: SealingKeyPair,
    request: Request,
    code: LinkCode,
}

/// A grant in the inbox.
struct Found {
    grant: Grant,
    seq: Seq,
    store_id: Vec<u8>,
    /// The seqs of the messages up to the grant.
    seqs: Vec<u64>,
    connection: Arc<Live>,
}

/// The result of one read of the inbox.
enum Look {
    Found(Box<Found>),
    /// A grant that does not verify.
    Forged,
    Nothing,
}

impl Messenger {
    /// Sends a request to the account's devices to link this one, with a new profile in `dir`.
    ///
    /// `name` has 1 to [`MAX_DEVICE_NAME`](crate::MAX_DEVICE_NAME) bytes. With [`Trust::FirstUse`]
    /// the server's certificate is pinned in the profile.
    ///
    /// # Errors
    /// [`ProfileError::Exists`], [`AuthError::WrongPassword`](crate::AuthError::WrongPassword).
    pub async fn link(
        dir: &Path,
        options: Options,
        username: &Username,
        password: &Password,
        name: &str,
    ) -> Result<Linking, Error> {
        check_name(name)?;
        check_missing(dir)?;
        let in_use = profile::lock(dir).await?;
        check_missing(dir)?;
        let client = pinned(options).await?;
        let (device, device_seed) = new_device(name);
        client.set_device(Some(device.id()));
        let session = client.login(username, password).await?;
        interrupted::revoke(&client, dir).await?;
        let identity = identity_of(&client, username).await?;
        let keys = SealingKeyPair::generate();
        let request = Request::create(&device, keys.public(), now());
        interrupted::note(dir, &device.id())?;
        send(&client, &identity, &request).await?;
        let coded = request.clone();
        let code = blocking(move || coded.code()).await;
        let username = username.clone();
        Ok(Linking {
            in_use,
            client,
            session,
            username,
            identity,
            device_seed,
            keys,
            request,
            code,
        })
    }
}

/// Creates a client that trusts one certificate: with [`Trust::FirstUse`] that of the server now.
pub(in crate::messenger) async fn pinned(mut options: Options) -> Result<Client, Error> {
    if options.trust == Trust::FirstUse {
        let client = Client::new(options.clone()).map_err(CallError::from)?;
        options.trust = Trust::Pinned(client.connect().await?);
        client.close().await;
    }
    Ok(Client::new(options).map_err(CallError::from)?)
}

pub(in crate::messenger) fn check_missing(dir: &Path) -> Result<(), ProfileError> {
    match Profile::read(dir) {
        Err(ProfileError::Missing(_)) => Ok(()),
        Ok(_) => Err(ProfileError::Exists(dir.to_owned())),
        Err(error) => Err(error),
    }
}

/// Creates a device that is not certified yet.
pub(in crate::messenger) fn new_device(name: &str) -> (Device, Zeroizing<[u8; 32]>) {
    let (mut id, mut seed) = ([0; 16], Zeroizing::new([0; 32]));
    OsRng.fill_bytes(&mut id);
    OsRng.fill_bytes(&mut *seed);
    (Device::new(DeviceId::new(id), name, &seed, [0; 64]), seed)
}

pub(in crate::messenger) async fn identity_of(
    client: &Client,
    username: &Username,
) -> Result<IdentityKey, Error> {
    let request = v1::ResolveUserRequest { username: username.to_string(), ..Default::default() };
    match client.call::<methods::ResolveUser>(request).await {
        Ok(answer) => IdentityKey::try_from(&answer.identity_key[..])
            .map_err(|_| CallError::Malformed { method: "ResolveUser" }.into()),
        Err(error) if is_not_found(&error) => Err(Error::NoSuchUser(username.clone())),
        Err(error) => Err(error.into()),
    }
}

/// Sends the request to the account's own inbox.
async fn send(client: &Client, identity: &IdentityKey, request: &Request) -> Result<(), CallError> {
    let ttl = LINK_REQUEST_LIFETIME.as_secs();
    let call = v1::EnqueueRequest {
        recipient_key: identity.as_bytes().to_vec().into(),
        payload: request.message().into(),
        channel_id: request_channel(identity).as_bytes().to_vec().into(),
        ttl_secs: u32::try_from(ttl).expect("it is some minutes"),
        message_id: fresh_message_id(now()).as_bytes().to_vec().into(),
        ..Default::default()
    };
    client.call::<methods::Enqueue>(call).await.map(drop)
}

impl Linking {
    /// Returns the code to compare with the one on an old device.
    pub fn code(&self) -> LinkCode {
        self.code
    }

    /// Returns the id of the new device.
    pub fn device(&self) -> DeviceId {
        self.request.device
    }

    /// Waits until a device of the account has approved this one, and creates the profile. If the
    /// server cannot be reached after that, the conversations are joined later.
    ///
    /// # Errors
    /// [`Error::LinkNotApproved`] after `patience`, or [`Error::LinkGrantForged`] if only grants
    /// that do not verify have arrived.
    pub async fn finish(self, patience: Duration) -> Result<Messenger, Error> {
        match Box::pin(self.wait(patience)).await {
            Ok(found) => Box::pin(self.complete(found)).await,
            Err(error) => {
                if let Err(error) = self.client.end_session(self.session.token.clone()).await {
                    tracing::debug!(%error, "the session was not ended");
                }
                self.client.close().await;
                Err(error)
            }
        }
    }

    async fn wait(&self, patience: Duration) -> Result<Found, Error> {
        let until = Instant::now() + patience;
        let mut over = Error::LinkNotApproved;
        loop {
            match timeout_at(until, self.look()).await {
                Err(_) => return Err(over),
                Ok(Ok(Look::Found(found))) => return Ok(*found),
                Ok(Ok(Look::Forged)) => over = Error::LinkGrantForged,
                Ok(Ok(Look::Nothing)) => {}
                // Until the device is registered, it has no position in the inbox.
                Ok(Err(error))
                    if error.is_temporary() || error.is_code("delivery.device_required") => {}
                Ok(Err(error)) => return Err(error.into()),
            }
            if Instant::now() + POLL >= until {
                return Err(over);
            }
            sleep(POLL).await;
        }
    }

    /// Looks for the grant in the inbox.
    async fn look(&self) -> Result<Look, CallError> {
        let (mut after, mut seqs, mut look) = (0, Vec::new(), Look::Nothing);
        for _ in 0..MAX_PAGES {
            let request = v1::PeekRequest {
                all_channels: true,
                after_seq: after,
                limit: PAGE,
                ..Default::default()
            };
            let (page, connection) = self.client.call_any::<methods::Peek>(request).await?;
            for envelope in &page.payloads {
                if envelope.seq <= after {
                    return Err(CallError::Malformed { method: "Peek" });
                }
                after = envelope.seq;
                seqs.push(envelope.seq);
                if !self.is_grant(envelope) {
                    continue;
                }
                match self.open(&envelope.data) {
                    Some(grant) => {
                        let (seq, store_id) = (Seq(envelope.seq), page.store_id.to_vec());
                        let found = Found { grant, seq, store_id, seqs, connection };
                        return Ok(Look::Found(Box::new(found)));
                    }
                    None => {
                        tracing::warn!(seq = envelope.seq, "a grant does not verify");
                        look = Look::Forged;
                    }
                }
            }
            if !page.more {
                break;
            }
        }
        Ok(look)
    }

    fn is_grant(&self, envelope: &v1::Envelope) -> bool {
        envelope.channel_id[..] == grant_channel(&self.request.device).as_bytes()[..]
            && envelope.data.starts_with(grant::PREFIX)
    }

    fn open(&self, message: &[u8]) -> Option<Grant> {
        let export_key = &self.session.export_key;
        Grant::open(message, &self.keys, &self.request, &self.identity, export_key)
    }

    /// Creates the profile, acknowledges the grant, and joins the conversations.
    async fn complete(self, found: Found) -> Result<Messenger, Error> {
        let Self { in_use, client, session, username, device_seed, request, .. } = self;
        let Found { grant, seq, store_id, seqs, connection } = found;
        let device = Device::new(request.device, &request.name, &device_seed, grant.proof);
        let account = grant.account;
        let new = NewProfile { in_use, client, session, username, device, account, seq, store_id };
        let messenger = new.create(|_| Ok(())).await?;
        let ack = v1::AckRequest { all_channels: true, seqs, ..Default::default() };
        // If this fails, the messages up to the grant are read again, and ignored.
        if let Err(error) = messenger.client().call_on::<methods::Ack>(&connection, ack).await {
            tracing::debug!(%error, "the grant was not acknowledged");
        }
        if let Err(error) = messenger.join_conversations().await {
            tracing::warn!(%error, "conversations not joined, retrying later");
        }
        Ok(messenger)
    }
}

/// The profile of a registered device that has received the content of its account.
pub(in crate::messenger) struct NewProfile {
    pub(in crate::messenger) in_use: InUse,
    pub(in crate::messenger) client: Client,
    pub(in crate::messenger) session: Session,
    pub(in crate::messenger) username: Username,
    pub(in crate::messenger) device: Device,
    pub(in crate::messenger) account: AccountContent,
    /// The seq after which the device reads the inbox.
    pub(in crate::messenger) seq: Seq,
    pub(in crate::messenger) store_id: Vec<u8>,
}

impl NewProfile {
    /// Creates the profile, which is complete once `profile.json` exists. `also` adds to the state.
    pub(in crate::messenger) async fn create(
        self,
        also: impl FnOnce(&State) -> Result<(), DatabaseError> + Send + 'static,
    ) -> Result<Messenger, Error> {
        let Self { in_use, client, session, username, device, account, seq, store_id } = self;
        let (dir, identity, id) = (in_use.dir.clone(), account.identity.public(), device.id());
        discard(&dir)?;
        let key = derive(&session.password, &session.export_key, Salt::random()).await;
        let (name, token) = (username.clone(), session.token);
        let store = StateStore::create_with(in_use, key, move |database| {
            let mut state = begin(database, account, name, device)?;
            state.set_token(Some(&token))?;
            state.begin_reading(seq, &store_id)?;
            also(&state)?;
            state.save()
        })
        .await?;
        let profile = Profile {
            username,
            server: client.options().server.clone(),
            trust: client.options().trust.clone(),
            identity,
            status: ProfileStatus::Registered,
            device: Some(id),
        };
        profile.write(&dir)?;
        interrupted::forget(&dir);
        assemble(client, profile, store).await
    }
}

impl Messenger {
    /// Publishes KeyPackages and joins the conversations that the new device has received.
    pub(in crate::messenger) async fn join_conversations(&self) -> Result<(), Error> {
        self.settle_keys(NewKeys::Needed).await?;
        self.sync_and_settle_keys().await?;
        self.run_changes(None).await.map(drop)
    }
}

/// Creates the state of a device that was added to its account.
fn begin(
    database: &Database,
    account: AccountContent,
    username: Username,
    device: Device,
) -> Result<State, DatabaseError> {
    let mut state = State::create(database, account.identity, username)?;
    state.mls.set_device(device)?;
    state.set_number(LINKED, Some(1))?;
    state.note_other_devices()?;
    state.replace_packages()?;
    let me = state.me();
    for person in account.people.iter().filter(|person| person.identity != me) {
        state.people.adopt(&person.identity, &person.known)?;
        if person.is_acquainted {
            state.note_acquaintance(&person.identity)?;
        }
    }
    for key in &account.blocked {
        state.database().put(BLOCKED, key.as_bytes(), None, key.as_bytes())?;
    }
    for conversation in account.conversations {
        let (channel, known) = (conversation.channel, conversation.members);
        state.add_change(Operation::Join { channel, known })?;
    }
    Ok(state)
}

impl State {
    /// Notes that reading the inbox begins after `seq`. Messages up to it do not count as missing.
    fn begin_reading(&self, seq: Seq, store_id: &[u8]) -> Result<(), DatabaseError> {
        self.set_number(LAST_SEQ, Some(seq.0))?;
        self.set_number(LEGACY_CURSOR, Some(seq.0))?;
        self.is_other_store(store_id).map(drop)
    }
}
