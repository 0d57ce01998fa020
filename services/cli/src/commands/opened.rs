//! Opening the profile for a command, and closing it again.

use std::time::Duration;

use qpq_client::{CallError, Client, ConnectionEvent, Error, Fingerprint, Messenger, Profile};
use tokio::time::timeout;

use crate::{
    compose::Context,
    fault::{Exit, Fault},
    password::Source,
};

/// How long a command tries to reach the server. A person waits, so this is shorter than what the
/// library allows.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Opens the chosen profile, connects, lets `work` work with it, and says goodbye to the server.
pub(crate) async fn with<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let messenger = Box::pin(context.progress.during("opening", open(context))).await?;
    let connected = context.progress.during("connecting", connect(messenger.client())).await;
    let done = match connected {
        Ok(_) => work(&messenger).await,
        Err(fault) => Err(fault),
    };
    messenger.client().close().await;
    done
}

/// As [`with`], after what has come to the inbox was taken in: groups and conversations that others
/// have begun are known.
pub(crate) async fn with_news<T>(
    context: &Context,
    work: impl AsyncFnOnce(&Messenger) -> Result<T, Fault>,
) -> Result<T, Fault> {
    with(context, async |messenger| {
        context.progress.during("looking for news", Box::pin(messenger.receive())).await?;
        work(messenger).await
    })
    .await
}

/// Opens the chosen profile with the key kept since the login or, if the password is at hand, with
/// that.
pub(crate) async fn open(context: &Context) -> Result<Messenger, Fault> {
    let dir = context.dir();
    context.agree_with(&Profile::read(&dir).map_err(Error::from)?)?;
    if let Some(key) = context.keyring.get(&dir) {
        return Ok(Box::pin(Messenger::unlock_with_key(&dir, key)).await?);
    }
    if context.keyring.exists() && matches!(context.password, Source::Terminal) {
        return Err(Fault::not_logged_in());
    }
    let password = context.password.known().await?;
    Ok(Box::pin(Messenger::unlock(&dir, &password)).await?)
}

/// Makes the connection, or says soon that it cannot be had.
pub(crate) async fn connect(client: &Client) -> Result<Fingerprint, Fault> {
    let events = client.connection_events();
    match timeout(CONNECT_PATIENCE, client.connect()).await {
        Ok(connected) => Ok(connected?),
        Err(_) => {
            let reason = match &*events.borrow() {
                ConnectionEvent::Reconnecting { reason, .. } => reason.clone(),
                _ => "no answer".to_owned().into(),
            };
            let server = client.options().server.clone();
            Err(CallError::Unreachable { server, waited: CONNECT_PATIENCE, reason }.into())
        }
    }
}

impl Context {
    /// Refuses options that name another server, or another proof of it, than the profile has.
    fn agree_with(&self, profile: &Profile) -> Result<(), Fault> {
        let differs = self.named_server().is_some_and(|server| *server != profile.server)
            || self.named_trust().is_some_and(|trust| *trust != profile.trust);
        if differs {
            let message = format!(
                "the profile {} belongs to the server {}, known by other means than those given",
                self.profile, profile.server
            );
            return Err(Fault::new(Exit::Usage, "client.other_server", message).hint(
                "leave out --server and --pin; if the server has moved, give them to `qpq login` once",
            ));
        }
        Ok(())
    }
}
