//! The account: register, login, logout, passwd, whoami.

use std::{
    io::{self, IsTerminal as _, Write},
    path::PathBuf,
    time::Duration,
};

use qpq_client::{
    AuthError, CallError, Client, Error, Fingerprint, LogoutScope, Messenger, NewAccount, Options,
    PasswordChanged, Profile, ProfileError, ProfileStatus, Trust, Username, fingerprint, methods,
    v1,
};
use qpq_ports::{Clock as _, SystemClock};
use serde::Serialize;

use super::opened::{self, connect};
use crate::{
    compose::Context,
    entry::span,
    error::{CliError, Exit},
    output::{Format, Report, Style},
    password::{self, Source},
    text,
    unlock::Kept,
};

/// The report of a registration, of a login, and of a device that was linked.
#[derive(Debug, Serialize)]
struct LoggedIn {
    event: &'static str,
    profile: String,
    username: String,
    server: String,
    /// The fingerprint of the server's certificate.
    server_fingerprint: String,
    identity: String,
    /// Whether other commands need no password now.
    unlocked: bool,
    /// The difference by which this machine's clock is ahead of the server's; negative if it is
    /// behind. Only after a registration, and only if the clock is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    clock_difference_ms: Option<i64>,
    #[serde(skip)]
    is_pinned_now: bool,
}

impl Report for LoggedIn {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { username, server_fingerprint, .. } = self;
        let server = text::line(&self.server);
        match self.event {
            "registered" => {
                writeln!(out, "{} is registered on {server} and logged in.", style.bold(username))?
            }
            "linked" => writeln!(
                out,
                "This device is linked to {} on {server} and logged in.",
                style.bold(username)
            )?,
            "restored" => {
                writeln!(
                    out,
                    "{} is restored on {server} and logged in, with contacts and conversations.",
                    style.bold(username)
                )?;
                writeln!(
                    out,
                    "Messages from before are not restored. If a device is lost, run `qpq device revoke`."
                )?
            }
            _ => writeln!(out, "{} is logged in on {server}.", style.bold(username))?,
        }
        if self.is_pinned_now {
            writeln!(
                out,
                "The server's fingerprint is pinned from now on; compare it with what the server printed:"
            )?;
            writeln!(out, "  {server_fingerprint}")?;
        }
        if let Some(difference) = self.clock_difference_ms {
            let span = span(Duration::from_millis(difference.unsigned_abs()));
            let side = if difference < 0 { "behind" } else { "ahead of" };
            writeln!(
                out,
                "This machine's clock is {span} {side} the server's. Until it is right, others cannot"
            )?;
            writeln!(out, "write to you first. Set it, then run `qpq recv`.")?;
        }
        if !self.unlocked {
            writeln!(
                out,
                "There is no memory file system to keep the key in: each command will ask for the password."
            )?;
        }
        Ok(())
    }
}

pub(crate) async fn register(
    context: &Context,
    username: &Username,
    device: &str,
    mut invite: Option<String>,
) -> Result<(), CliError> {
    let dir = context.dir();
    let mut options = match Profile::read(&dir) {
        Ok(Profile { status: ProfileStatus::Registered, .. }) => return Err(exists(context)),
        // An interrupted registration is continued.
        Ok(profile) => profile.options(),
        Err(ProfileError::Missing(_)) => context.fresh_options()?,
        Err(error) => return Err(Error::from(error).into()),
    };
    let seen = check_server(context, &options).await?;
    let is_pinned_now = options.trust == Trust::FirstUse;
    options.trust = options.trust.settled(seen);
    let password = context.password.chosen(&context.output).await?;
    let is_terminal = io::stdin().is_terminal() && context.output.format == Format::Human;
    let messenger = loop {
        let account =
            NewAccount { username, password: &password, invite: invite.as_deref(), device };
        let registering = Box::pin(Messenger::register_account(&dir, options.clone(), account));
        match context.progress.during("registering", registering).await {
            Err(Error::Auth(AuthError::InviteRequired)) if invite.is_none() && is_terminal => {
                invite = Some(password::ask_for_invite().await?);
            }
            registered => break registered?,
        }
    };
    let reported = report(context, "registered", &messenger, is_pinned_now).await;
    opened::close(messenger).await;
    reported
}

pub(crate) async fn login(
    context: &Context,
    username: Option<&Username>,
    device: &str,
    code: Option<Source>,
) -> Result<(), CliError> {
    let dir = context.dir();
    let profile = match (Profile::read(&dir), username) {
        (Err(ProfileError::Missing(_)), Some(username)) => {
            return restore(context, username, device, code).await;
        }
        (Ok(profile), Some(username)) if profile.username != *username => {
            return Err(exists(context));
        }
        (profile, _) => profile.map_err(Error::from)?,
    };
    let mut options = context.options(&profile);
    let seen = check_server(context, &options).await?;
    options.trust = options.trust.settled(seen);
    let password = context.password.known().await?;
    let unlocking = async {
        if (&options.server, &options.trust) == (&profile.server, &profile.trust) {
            let kept = context.keyring.get(&dir);
            Messenger::unlock_or_reseal(&dir, &password, kept).await
        } else {
            Messenger::unlock_at(&dir, options.server, options.trust, &password).await
        }
    };
    let messenger = context.progress.during("logging in", Box::pin(unlocking)).await?;
    if messenger.is_revoked().await {
        opened::close(messenger).await;
        return Err(Error::DeviceRevoked.into());
    }
    let reported = report(context, "logged_in", &messenger, false).await;
    opened::close(messenger).await;
    reported
}

/// Restores an account from its recovery bundle, as a new device.
async fn restore(
    context: &Context,
    username: &Username,
    device: &str,
    code: Option<Source>,
) -> Result<(), CliError> {
    let dir = context.dir();
    let mut options = context.fresh_options()?;
    let seen = check_server(context, &options).await?;
    let is_pinned_now = options.trust == Trust::FirstUse;
    options.trust = options.trust.settled(seen);
    let password = context.password.known().await?;
    let code = match code {
        Some(source) => Some(source.recovery_code().await?),
        None => None,
    };
    let code = code.as_ref();
    let restoring = Messenger::restore_account(&dir, options, username, &password, device, code);
    let messenger = context.progress.during("restoring the account", Box::pin(restoring)).await?;
    let reported = report(context, "restored", &messenger, is_pinned_now).await;
    opened::close(messenger).await;
    reported
}

/// Checks that the server is reachable and is the trusted one, before the user types a password.
pub(super) async fn check_server(
    context: &Context,
    options: &Options,
) -> Result<Fingerprint, CliError> {
    let client = Client::new(options.clone()).map_err(CallError::from)?;
    let seen = context.progress.during("connecting", connect(&client)).await?;
    client.close().await;
    Ok(seen)
}

pub(super) async fn report(
    context: &Context,
    event: &'static str,
    messenger: &Messenger,
    is_pinned_now: bool,
) -> Result<(), CliError> {
    let clock_difference_ms = match event {
        "registered" => clock_difference(messenger).await,
        _ => None,
    };
    let kept = context.keyring.put(&context.dir(), &messenger.vault_key().await)?;
    let profile = messenger.profile();
    context.output.report(&LoggedIn {
        event,
        profile: context.profile.to_string(),
        username: profile.username.to_string(),
        server: profile.server.clone(),
        server_fingerprint: connect(messenger.client()).await?.to_string(),
        identity: profile.identity.to_string(),
        unlocked: kept == Kept::Yes,
        clock_difference_ms,
        is_pinned_now,
    })
}

/// The difference between two clocks up to which it is of no consequence.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// Returns the milliseconds by which this machine's clock is ahead of the server's, if they matter.
///
/// The account was registered just now, so its time of registration is the server's present time.
async fn clock_difference(messenger: &Messenger) -> Option<i64> {
    let (server, here) = (messenger.registered_at().await.ok()?, SystemClock.now());
    let difference = i128::from(here.0) - i128::from(server.0);
    let matters = difference.unsigned_abs() > CLOCK_TOLERANCE.as_millis();
    i64::try_from(difference).ok().filter(|_| matters || messenger.are_keys_refused())
}

fn exists(context: &Context) -> CliError {
    let message = format!("the profile {} has an account already", context.profile);
    CliError::new(Exit::Failure, "profile.exists", message).hint(
        "log in to it with `qpq login`, or register in another profile: qpq -p NAME register …",
    )
}

#[derive(Debug, Serialize)]
struct LoggedOut {
    event: &'static str,
    profile: String,
    username: String,
    /// The number of sessions that the server has ended; null if it could not be reached.
    sessions_ended: Option<u32>,
    /// The reason why the server could not be reached.
    problem: Option<String>,
    /// Whether the profile was already locked.
    #[serde(skip)]
    was_locked: bool,
}

impl Report for LoggedOut {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let username = style.bold(&self.username);
        match (self.sessions_ended, &self.problem) {
            (Some(0 | 1), _) => writeln!(out, "{username} is logged out."),
            (Some(ended), _) => {
                writeln!(out, "{username} is logged out; {ended} sessions were ended.")
            }
            (None, _) if self.was_locked => {
                writeln!(out, "{username} is not logged in on this machine.")?;
                writeln!(
                    out,
                    "A session from before a reboot, if there is one, ends at the next `qpq login`, or by itself when it has not been used for long."
                )
            }
            (None, problem) => {
                let problem = problem.as_deref().unwrap_or("it is not known why");
                writeln!(out, "{username} is logged out on this machine: the key is forgotten.")?;
                writeln!(out, "The session on the server was not ended: {problem}.")?;
                writeln!(
                    out,
                    "It ends at the next `qpq login`, or by itself when it has not been used for long."
                )
            }
        }
    }
}

pub(crate) async fn logout(context: &Context, all: bool) -> Result<(), CliError> {
    let dir = context.dir();
    let profile = Profile::read(&dir).map_err(Error::from)?;
    let scope = if all { LogoutScope::EverySession } else { LogoutScope::ThisSession };
    let ended = match opened::open(context).await {
        Ok(messenger) => context.progress.during("logging out", end(messenger, scope)).await,
        // Another process would continue to use the key.
        Err(error) if error.exit == Exit::InUse => return Err(error),
        Err(error) => Err(error),
    };
    context.keyring.remove(&dir)?;
    match ended {
        Err(error) if all => Err(error),
        ended => context.output.report(&LoggedOut {
            event: "logged_out",
            profile: context.profile.to_string(),
            username: profile.username.to_string(),
            sessions_ended: ended.as_ref().ok().copied(),
            was_locked: ended
                .as_ref()
                .is_err_and(|error| error.code == CliError::not_logged_in().code),
            problem: ended.err().map(|error| error.message),
        }),
    }
}

/// Ends the session, or every one of the account.
async fn end(messenger: Messenger, scope: LogoutScope) -> Result<u32, CliError> {
    connect(messenger.client()).await?;
    match Box::pin(messenger.logout(scope)).await {
        Ok(ended) => Ok(ended),
        Err(error) if error.is_unauthorized() && scope == LogoutScope::ThisSession => Ok(0),
        Err(error) => Err(error.into()),
    }
}

#[derive(Debug, Serialize)]
struct PasswordChange {
    event: &'static str,
    profile: String,
    username: String,
    /// The number of other sessions that the server has ended; null if that answer was lost.
    sessions_ended: Option<u32>,
    /// Whether other commands need no password now.
    unlocked: bool,
}

impl Report for PasswordChange {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        writeln!(out, "The password of {} is changed.", style.bold(&self.username))?;
        match self.sessions_ended {
            Some(0) => Ok(()),
            Some(1) => writeln!(out, "One other session was ended."),
            Some(ended) => writeln!(out, "{ended} other sessions were ended."),
            None => writeln!(out, "All other sessions were ended."),
        }?;
        if self.sessions_ended != Some(0) {
            writeln!(
                out,
                "On your other devices run `qpq login` before they are restarted or logged out."
            )?;
        }
        Ok(())
    }
}

pub(crate) async fn passwd(
    context: &Context,
    new_password_file: Option<PathBuf>,
) -> Result<(), CliError> {
    let dir = context.dir();
    let profile = Profile::read(&dir).map_err(Error::from)?;
    check_server(context, &profile.options()).await?;
    let old = context.password.known().await?;
    let source = new_password_file.map_or(Source::Terminal, Source::File);
    let new = source.replacement(&context.output).await?;
    let changing = Box::pin(Messenger::change_password(&dir, &old, &new));
    let PasswordChanged { messenger, ended_sessions } =
        context.progress.during("changing the password", changing).await?;
    let kept = context.keyring.put(&dir, &messenger.vault_key().await);
    opened::close(messenger).await;
    context.output.report(&PasswordChange {
        event: "password_changed",
        profile: context.profile.to_string(),
        username: profile.username.to_string(),
        sessions_ended: ended_sessions,
        unlocked: kept? == Kept::Yes,
    })
}

#[derive(Debug, Serialize)]
struct Whoami {
    profile: String,
    username: String,
    server: String,
    /// `pinned`, `authority` or `system`.
    trust: &'static str,
    server_fingerprint: Option<String>,
    identity: String,
    fingerprint: String,
    /// `valid`, `ended`, `none` (logged out) or `unknown` (the server cannot be asked).
    session: &'static str,
    /// The reason why the state of the session is unknown.
    problem: Option<String>,
    #[serde(skip)]
    login: String,
}

impl Report for Whoami {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let Self { username, fingerprint, identity, .. } = self;
        let session = match (self.session, &self.problem) {
            ("valid", _) => "logged in".to_owned(),
            ("ended", _) => format!("the session has ended; run `{}`", self.login),
            ("none", _) => format!("logged out; run `{}`", self.login),
            (_, problem) => {
                format!("logged in, but unchecked: {}", problem.as_deref().unwrap_or_default())
            }
        };
        let known_by = match &self.server_fingerprint {
            Some(fingerprint) => format!("pinned, {fingerprint}"),
            None if self.trust == "authority" => "from an authority of your choice".to_owned(),
            None => "from one of the system's authorities".to_owned(),
        };
        writeln!(out, "{} on {}", style.bold(username), text::line(&self.server))?;
        writeln!(out, "  session      {session}")?;
        writeln!(out, "  profile      {}", self.profile)?;
        writeln!(out, "  certificate  {known_by}")?;
        writeln!(out, "  identity     {identity}")?;
        writeln!(out, "  fingerprint  {fingerprint}")
    }
}

pub(crate) async fn whoami(context: &Context) -> Result<(), CliError> {
    let profile = Profile::read(&context.dir()).map_err(Error::from)?;
    let (session, problem) = match Box::pin(check_session(context)).await {
        Ok(()) => ("valid", None),
        Err(error) if error == CliError::not_logged_in() => ("none", None),
        Err(error) if error.exit == Exit::NotLoggedIn => ("ended", None),
        Err(error) if error.exit == Exit::Usage => return Err(error),
        Err(error) => ("unknown", Some(error.message)),
    };
    let (trust, server_fingerprint) = match &profile.trust {
        Trust::FirstUse => ("first-use", None),
        Trust::Pinned(fingerprint) => ("pinned", Some(fingerprint.to_string())),
        Trust::PinnedEither([one, other]) => ("pinned", Some(format!("{one},{other}"))),
        Trust::Authority(_) => ("authority", None),
        Trust::System => ("system", None),
    };
    context.output.report(&Whoami {
        profile: context.profile.to_string(),
        username: profile.username.to_string(),
        server: profile.server.clone(),
        trust,
        server_fingerprint,
        identity: profile.identity.to_string(),
        fingerprint: fingerprint(&profile.identity),
        session,
        problem,
        login: context.profile.login(),
    })
}

/// Calls a method that needs the session.
async fn check_session(context: &Context) -> Result<(), CliError> {
    opened::with(context, async |messenger| {
        let count = v1::CountKeyPackagesRequest::default();
        let answer: Result<_, CallError> =
            messenger.client().call::<methods::CountKeyPackages>(count).await;
        answer?;
        Ok(())
    })
    .await
}
