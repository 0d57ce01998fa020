//! Opening the profile for a command, and closing it again.

use std::time::Duration;

use qpq_client::{
    CallError, Client, ConnectionEvent, Error, Fingerprint, Messenger, Profile, methods, v1,
};
use qpq_ports::{Clock as _, SystemClock};
use tokio::time::timeout;

use crate::{
    compose::Context,
    error::{CliError, Exit},
    password::Source,
    text,
};

/// The maximum time to reach the server. Shorter than the library allows, since a person waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum time to read the inbox before a message is sent.
const INBOX_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the chosen profile, connects, runs `work`, and closes the connection.
pub(crate) async fn with<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger) -> Result<T, CliError>,
) -> Result<T, CliError> {
    with_or_without_server(context, async |messenger, unreachable| match unreachable {
        None => work(messenger).await,
        Some(error) => Err(error),
    })
    .await
}

/// Runs `work` as [`with`] does, after the inbox was read, so that groups and conversations which
/// others have begun are known.
pub(crate) async fn with_news<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger) -> Result<T, CliError>,
) -> Result<T, CliError> {
    with(context, async |messenger| {
        context.progress.during("reading the inbox", Box::pin(messenger.receive())).await?;
        work(messenger).await
    })
    .await
}

/// Runs `work` as [`with_news`] does, for commands that save messages which cannot be sent now. If
/// the inbox cannot be read in time, `work` runs all the same. If the server cannot be reached,
/// `work` receives the reason.
pub(crate) async fn to_send<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger, Option<CliError>) -> Result<T, CliError>,
) -> Result<T, CliError> {
    with_or_without_server(context, async |messenger, unreachable| {
        if messenger.was_revoked().await? {
            return Err(Error::DeviceRevoked.into());
        }
        if unreachable.is_none() {
            // Dropping this future at any point loses nothing.
            let news = timeout(INBOX_TIMEOUT, Box::pin(messenger.receive()));
            if let Ok(Err(error)) = context.progress.during("reading the inbox", news).await
                && !is_temporary(&error)
            {
                return Err(error.into());
            }
        }
        work(messenger, unreachable).await
    })
    .await
}

/// Returns whether the same operation may succeed later without further action.
pub(crate) fn is_temporary(error: &Error) -> bool {
    error.call().is_some_and(CallError::is_temporary)
}

/// Runs `work` as [`with`] does, for commands that can do without the server. If the server cannot
/// be reached, `work` receives the reason.
pub(crate) async fn locally<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger, Option<CliError>) -> Result<T, CliError>,
) -> Result<T, CliError> {
    with_or_without_server(context, work).await
}

async fn with_or_without_server<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger, Option<CliError>) -> Result<T, CliError>,
) -> Result<T, CliError> {
    let mut messenger = Box::pin(context.progress.during("opening", open(context))).await?;
    if messenger.was_revoked().await? {
        let done = work(&messenger, Some(Error::DeviceRevoked.into())).await;
        close(messenger).await;
        return done;
    }
    let mut done = context.progress.during("connecting", connect(messenger.client())).await;
    if done.is_ok() && has_ended(context, &messenger).await {
        close(messenger).await;
        messenger = Box::pin(context.progress.during("logging in", log_in(context))).await?;
        done = connect(messenger.client()).await;
    }
    let done = match done {
        Ok(_) => work(&messenger, None).await,
        Err(error) if error.exit == Exit::Unreachable => work(&messenger, Some(error)).await,
        Err(error) => Err(error),
    };
    if messenger.are_keys_refused() {
        context.output.note(format_args!(
            "Note: the server refuses your key packages, so others may be unable to write to you \
             first. Is this machine's clock right? It says {}.",
            text::utc(SystemClock.now())
        ));
    }
    close(messenger).await;
    done
}

/// Returns whether the session has ended and the password for another one is at hand.
async fn has_ended(context: &Context, messenger: &Messenger) -> bool {
    if matches!(context.password, Source::Terminal) {
        return false;
    }
    let count = v1::CountKeyPackagesRequest::default();
    let counted = messenger.client().call::<methods::CountKeyPackages>(count).await;
    counted.is_err_and(|error| error.is_unauthorized())
}

/// Closes the connection. Other commands can use the profile before that.
pub(crate) async fn close(messenger: Messenger) {
    let client = messenger.client().clone();
    drop(messenger);
    client.close().await;
}

/// Opens the chosen profile with the key kept since the login or, without one, with the password if
/// it is at hand.
pub(crate) async fn open(context: &Context) -> Result<Messenger, CliError> {
    let dir = context.dir();
    context.agree_with(&Profile::read(&dir).map_err(Error::from)?)?;
    if let Some(key) = context.keyring.get(&dir) {
        return Ok(Box::pin(Messenger::unlock_with_key(&dir, key)).await?);
    }
    if context.keyring.exists() && matches!(context.password, Source::Terminal) {
        return Err(CliError::not_logged_in());
    }
    log_in(context).await
}

/// Opens the chosen profile with the password. A kept key may be that of an earlier password.
async fn log_in(context: &Context) -> Result<Messenger, CliError> {
    let dir = context.dir();
    let password = context.password.known().await?;
    let kept = context.keyring.get(&dir);
    let is_kept = kept.is_some();
    let messenger = Box::pin(Messenger::unlock_or_reseal(&dir, &password, kept)).await?;
    if is_kept {
        context.keyring.put(&dir, &messenger.vault_key().await)?;
    }
    Ok(messenger)
}

/// Connects, or fails soon if the server cannot be reached.
pub(crate) async fn connect(client: &Client) -> Result<Fingerprint, CliError> {
    let events = client.connection_events();
    match timeout(CONNECT_TIMEOUT, client.connect()).await {
        Ok(connected) => Ok(connected?),
        Err(_) => {
            let reason = match &*events.borrow() {
                ConnectionEvent::Reconnecting { reason, .. } => reason.clone(),
                _ => "no answer".to_owned().into(),
            };
            let server = client.options().server.clone();
            Err(CallError::Unreachable { server, waited: CONNECT_TIMEOUT, reason }.into())
        }
    }
}

impl Context {
    /// Fails if options name another server, or another proof of its identity, than the profile
    /// has.
    fn agree_with(&self, profile: &Profile) -> Result<(), CliError> {
        let differs = self.named_server().is_some_and(|server| *server != profile.server)
            || self.named_trust().is_some_and(|trust| *trust != profile.trust);
        if differs {
            let message = format!(
                "the profile {} belongs to the server {}, known by other means than those given",
                self.profile, profile.server
            );
            return Err(CliError::new(Exit::Usage, "client.other_server", message).hint(
                "leave out --server and --pin; if the server has moved, give them to `qpq login` once",
            ));
        }
        Ok(())
    }
}
