//! A new device of an account whose devices are lost: fetches the bundle, registers itself, and
//! creates its profile.

use std::path::Path;

use qpq_domain::{DeviceId, IdentityKey, MAX_DEVICES, Seq, Username};
use qpq_mls::Device;
use qpq_proto::{methods, v1};

use super::{
    RecoveryCode,
    bundle::{Opened, code_slot, export_slot, open},
    fetch,
};
use crate::{
    client::{Client, Session},
    error::Error,
    messenger::{
        Messenger,
        devices::{check_name, register},
        link::{self, NewProfile, check_missing, identity_of, new_device, pinned},
        now,
        outbox::fresh_message_id,
    },
    options::Options,
    profile,
    secret::Password,
};

/// The time for which the server keeps the message that marks the device's position.
const POSITION_TTL_SECS: u32 = 15 * 60;

impl Messenger {
    /// Restores an account from its recovery bundle, with a new profile in `dir` and this machine
    /// as a new device. The history of conversations is not part of a bundle.
    ///
    /// `code` opens a bundle that was sealed under an earlier password.
    ///
    /// # Errors
    /// [`AuthError::WrongPassword`](crate::AuthError::WrongPassword), [`Error::NoRecovery`] if
    /// there is no bundle, [`Error::RecoverySealed`] if neither the password nor the code opens it,
    /// [`Error::TooManyDevices`].
    pub async fn restore_account(
        dir: &Path,
        options: Options,
        username: &Username,
        password: &Password,
        name: &str,
        code: Option<&RecoveryCode>,
    ) -> Result<Self, Error> {
        check_name(name)?;
        check_missing(dir)?;
        let in_use = profile::lock(dir).await?;
        check_missing(dir)?;
        let client = pinned(options).await?;
        let (device, seed) = new_device(name);
        client.set_device(Some(device.id()));
        let session = client.login(username, password).await?;
        link::revoke(&client, dir).await?;
        let (identity, fetched) = match find(&client, &session, username, code).await {
            Ok(found) => found,
            Err(error) => {
                if let Err(error) = client.end_session(session.token).await {
                    tracing::debug!(%error, "the session was not ended");
                }
                client.close().await;
                return Err(error);
            }
        };
        let Fetched { opened, version } = fetched;
        let proof = opened.account.identity.certify(&device.id(), &device.public());
        let device = Device::new(device.id(), name, &seed, proof);
        link::note(dir, &device.id())?;
        match register(&client, &device).await {
            Err(error) if error.is_code("device.too_many") => {
                return Err(Error::TooManyDevices { max: MAX_DEVICES });
            }
            done => done?,
        }
        let (seq, store_id) = position(&client, &identity, &device.id()).await?;
        let export = export_slot(&identity, &session.export_key);
        let Opened { account, code } = opened;
        let username = username.clone();
        let new = NewProfile { in_use, client, session, username, device, account, seq, store_id };
        let messenger =
            new.create(move |state| state.continue_keeping(export, code, version)).await?;
        if let Err(error) = messenger.join_conversations().await {
            tracing::warn!(%error, "conversations not joined, retrying later");
        }
        if let Err(error) = messenger.update_recovery().await {
            tracing::warn!(%error, "recovery bundle not stored, retrying later");
        }
        Ok(messenger)
    }
}

struct Fetched {
    opened: Opened,
    version: u64,
}

/// Fetches and opens the bundle. The identity key that the server states must be that of the
/// bundle.
async fn find(
    client: &Client,
    session: &Session,
    username: &Username,
    code: Option<&RecoveryCode>,
) -> Result<(IdentityKey, Fetched), Error> {
    let identity = identity_of(client, username).await?;
    let bundle = fetch(client).await?.ok_or(Error::NoRecovery)?;
    let export = export_slot(&identity, &session.export_key);
    let code = code.map(|code| code_slot(&identity, code));
    let opened = open(&identity, Some(&export), code.as_ref(), &bundle.bundle);
    let opened = opened.ok_or(Error::RecoverySealed)?;
    Ok((identity, Fetched { opened, version: bundle.version }))
}

/// Returns the position of the new device in the inbox, and the id of the store's history.
async fn position(
    client: &Client,
    identity: &IdentityKey,
    device: &DeviceId,
) -> Result<(Seq, Vec<u8>), Error> {
    let (channel, payload) = link::position_message(device);
    let message = v1::EnqueueRequest {
        recipient_key: identity.as_bytes().to_vec().into(),
        payload: payload.into(),
        channel_id: channel.as_bytes().to_vec().into(),
        ttl_secs: POSITION_TTL_SECS,
        message_id: fresh_message_id(now()).as_bytes().to_vec().into(),
        ..Default::default()
    };
    let seq = Seq(client.call::<methods::Enqueue>(message).await?.seq);
    let peek = v1::PeekRequest { all_channels: true, limit: 1, ..Default::default() };
    let page = client.call::<methods::Peek>(peek).await?;
    Ok((seq, page.store_id.to_vec()))
}
