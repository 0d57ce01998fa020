//! Errors for people and programs: a line that says what happened, a line that says what to do, a
//! stable code, and an exit code.

use std::{borrow::Cow, fmt, io, process::ExitCode};

use qpq_client::{AuthError, CallError, ConnectError, Error, MlsError, NoConnection, ProfileError};
use qpq_ports::{Clock as _, SystemClock};

use crate::{args::ProfileName, text};

/// The exit codes of the process. `qpq help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Failure = 1,
    Usage = 2,
    NotLoggedIn = 3,
    Unreachable = 4,
    Untrusted = 5,
    InUse = 6,
    Nothing = 7,
    Interrupted = 130,
    /// The exit code that a shell reports for SIGPIPE: the reader of standard output has closed it.
    PipeClosed = 141,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The reason why a command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CliError {
    pub(crate) exit: Exit,
    /// The stable code: the server's (`delivery.queue_full`) or one of ours (`client.unreachable`).
    pub(crate) code: Cow<'static, str>,
    pub(crate) message: String,
    /// Advice on what to do next.
    pub(crate) hint: Option<Cow<'static, str>>,
}

impl CliError {
    pub(crate) fn new(exit: Exit, code: &'static str, message: impl fmt::Display) -> Self {
        Self { exit, code: code.into(), message: message.to_string(), hint: None }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Returns the error about a file or directory that cannot be used.
    pub(crate) fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        Self::new(Exit::Failure, "client.io", format_args!("{what}: {error}"))
    }

    /// Returns the error about a failed write to standard output.
    pub(crate) fn output(error: &io::Error) -> Self {
        let failed = Self::io("cannot write to standard output", error);
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self { exit: Exit::PipeClosed, ..failed },
            _ => failed,
        }
    }

    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, "client.usage", message)
    }

    pub(crate) fn interrupted() -> Self {
        Self::new(Exit::Interrupted, "client.interrupted", "interrupted")
    }

    /// Adds the profile to the command in the hint. If a person types it as shown, it must not
    /// affect another profile.
    #[must_use]
    pub(crate) fn in_profile(mut self, profile: &ProfileName) -> Self {
        self.hint = self
            .hint
            .map(|hint| hint.replace("`qpq login", &format!("`{}", profile.login())).into());
        self
    }

    pub(crate) fn not_logged_in() -> Self {
        Self::new(Exit::NotLoggedIn, "client.not_logged_in", "you are not logged in")
            .hint("run `qpq login`")
    }
}

impl From<Error> for CliError {
    fn from(error: Error) -> Self {
        let failure = |code, hint: &'static str| Self::new(Exit::Failure, code, &error).hint(hint);
        match error {
            Error::Auth(error) => error.into(),
            Error::Call(error) => error.into(),
            Error::Profile(error) => error.into(),
            Error::NoSuchUser(_) => {
                failure("client.no_such_user", "check the spelling; usernames are case-insensitive")
            }
            Error::NoKeys(_) => failure("client.no_keys", "ask them to log in, then try again"),
            Error::IdentityChanged { ref username, .. } => {
                let hint = format!(
                    "ask {username} in person or by phone, and compare `qpq keys {username}` on both sides"
                );
                Self::new(Exit::Failure, "client.identity_changed", &error).hint(hint)
            }
            Error::Blocked(ref username) => {
                let hint = format!("run `qpq unblock {username}` first");
                Self::new(Exit::Failure, "client.blocked", &error).hint(hint)
            }
            Error::NoSuchConversation => {
                failure("client.no_such_conversation", "see `qpq group list`")
            }
            Error::NoSuchRequest => failure("client.no_such_request", "see `qpq requests`"),
            Error::TextTooLong { .. } => {
                failure("client.text_too_long", "send it in several messages")
            }
            Error::FileTooLarge { .. } => {
                failure("client.file_too_large", "send it in parts, or by another way")
            }
            Error::FileExpired => failure("client.file_expired", "ask the sender to send it again"),
            Error::FileForged => {
                failure("client.file_forged", "ask the sender, and the server's operator")
            }
            Error::FileExists(_) => {
                failure("client.file_exists", "name another file with --to, or give --force")
            }
            Error::FileNotWritten { .. } => {
                failure("client.file_not_written", "name another place with --to")
            }
            Error::GroupName { .. } => failure("client.group_name", "choose another name"),
            Error::AlreadyMember(_) => {
                failure("client.already_member", "`qpq group show GROUP` shows who is in it")
            }
            Error::GroupBusy => failure("client.group_busy", "try again in a minute"),
            Error::NoGroupInfo => {
                failure("client.no_group_info", "ask an admin of the group to add you again")
            }
            Error::NoSuchDevice => failure("client.no_such_device", "see `qpq device list`"),
            Error::ThisDevice => failure("client.this_device", "see `qpq device list`"),
            Error::NoDevice => failure("client.no_device", "ask the server's operator to upgrade"),
            Error::DeviceRevoked => failure(
                "client.device_revoked",
                "to use this machine again: qpq -p NAME device link …",
            ),
            Error::TooManyDevices { .. } => {
                let hint = "run `qpq device revoke` for one of them, and approve again: the new \
                            device still waits";
                failure("client.too_many_devices", hint)
            }
            Error::LinkNotApproved => {
                let hint = "run `qpq device link` again, and approve it; if it was approved, \
                            `qpq device approve` says why it was refused";
                failure("client.link_not_approved", hint)
            }
            Error::LinkGrantForged => {
                failure("client.link_forged", "ask the server's operator, and link again")
            }
            Error::LinkRequestExpired => {
                failure("client.link_expired", "check both clocks, and run `qpq device link` again")
            }
            Error::NoSuchLinkRequest => failure(
                "client.no_such_link_request",
                "compare it with the new device; a code expires after 15 minutes, then run \
                 `qpq device link` again",
            ),
            Error::NoRecovery => failure(
                "client.no_recovery",
                "add this machine with a device that you have: qpq device link --name NAME USERNAME",
            ),
            Error::RecoverySealed => failure(
                "client.recovery_sealed",
                "give the code with --recovery-code, or add this machine with a device that you \
                 have: qpq device link --name NAME USERNAME",
            ),
            Error::DeviceName { .. } => failure("client.device_name", "choose another name"),
            Error::PasswordUncertain(_) => {
                Self::new(Exit::Unreachable, "client.password_uncertain", error).hint(
                    "run `qpq login` with the new password; if it is refused, with the old one",
                )
            }
            Error::Mls(error) => error.into(),
            Error::State(_) => {
                failure("profile.io", "check that the directory is yours and the disk has space")
            }
        }
    }
}

impl From<MlsError> for CliError {
    fn from(error: MlsError) -> Self {
        if let MlsError::BadPackage { reason, .. } = &error
            && matches!(reason.reason(), "expired" | "not_yet_valid")
        {
            let now = text::utc(SystemClock.now());
            return Self::new(Exit::Failure, "client.bad_keys", error).hint(format!(
                "check this machine's clock, which says {now}; if it is right, ask them to log in"
            ));
        }
        let (code, hint) = match error {
            MlsError::UnknownGroup => ("client.no_such_conversation", "see `qpq group list`"),
            MlsError::NotAdmin => ("client.not_admin", "`qpq group show GROUP` shows the admins"),
            MlsError::NoLongerMember => {
                ("client.not_a_member", "the group's history can still be read")
            }
            MlsError::LastAdmin => ("client.last_admin", "run `qpq group admin GROUP USER` first"),
            MlsError::BadGroupInfo => {
                ("client.no_group_info", "ask an admin of the group to add you again")
            }
            MlsError::Alone => ("client.alone", "run `qpq group invite GROUP USER`"),
            MlsError::Yourself => ("client.yourself", "name another user"),
            MlsError::NotAMember(_) => {
                ("client.not_a_member", "`qpq group show GROUP` shows who is in it")
            }
            MlsError::DirectIsForTwo => ("client.direct", "run `qpq group create NAME USER…`"),
            MlsError::BadPackage { .. } | MlsError::WrongName(_) | MlsError::Incompatible(_) => {
                ("client.bad_keys", "ask them to update their client and log in")
            }
            _ => ("client.mls", "try again; if it stays so, start a new group"),
        };
        Self::new(Exit::Failure, code, error).hint(hint)
    }
}

impl From<AuthError> for CliError {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::WrongPassword => Self::new(Exit::NotLoggedIn, "auth.failed", error)
                .hint("try again; nobody can reset a password"),
            AuthError::UsernameTaken => {
                Self::new(Exit::Failure, "auth.username_taken", error).hint("choose another name")
            }
            AuthError::IdentityTaken => Self::new(Exit::Failure, "auth.identity_taken", error)
                .hint("register with a new profile (-p NAME)"),
            AuthError::InviteRequired => Self::new(Exit::Failure, "auth.invite_required", error)
                .hint("ask the server's operator for an invite, and give it with --invite CODE"),
            AuthError::InviteInvalid => Self::new(Exit::Failure, "auth.invite_invalid", error)
                .hint("check that the code is complete, or ask the operator for another invite"),
            AuthError::RegistrationClosed => {
                Self::new(Exit::Failure, "auth.registration_closed", error)
                    .hint("ask the server's operator, or choose another server")
            }
            AuthError::Banned => {
                Self::new(Exit::Failure, "auth.banned", error).hint("ask the server's operator")
            }
            AuthError::PasswordRefused => {
                Self::new(Exit::Failure, "client.password", error).hint("choose another password")
            }
            AuthError::Call(error) => error.into(),
        }
    }
}

impl From<CallError> for CliError {
    fn from(error: CallError) -> Self {
        let unreachable =
            |code, hint: &'static str| Self::new(Exit::Unreachable, code, &error).hint(hint);
        match error {
            CallError::Server(ref refusal) if error.is_unauthorized() => {
                Self { code: or(&refusal.code, "client.not_logged_in"), ..session_ended() }
            }
            CallError::Server(refusal) => refused(&refusal),
            CallError::Connect(error) => error.into(),
            CallError::Unreachable { reason: NoConnection::Full, .. } => Self::new(
                Exit::Unreachable,
                "client.server_full",
                format_args!("{}", NoConnection::Full),
            )
            .hint("try again in a few minutes; if that does not help, ask the server's operator"),
            CallError::Unreachable { .. } => unreachable(
                "client.unreachable",
                "check that the server runs and that its address (--server) and UDP port are right",
            ),
            CallError::TimedOut { .. } => unreachable("client.timed_out", "try again"),
            CallError::Lost { .. } => unreachable("client.connection_lost", "try again"),
            CallError::TooLarge { .. } => Self::new(Exit::Failure, "client.too_large", error),
            CallError::Malformed { .. } | CallError::ImpossibleSeq { .. } => {
                Self::new(Exit::Failure, "client.malformed_answer", error)
                    .hint("client and server may be of versions that do not go together")
            }
        }
    }
}

fn session_ended() -> CliError {
    CliError::new(Exit::NotLoggedIn, "client.session_ended", "your session has ended")
        .hint("run `qpq login`")
}

fn refused(refusal: &qpq_client::ServerError) -> CliError {
    if refusal.code == "group.not_member" {
        let message = "you are no longer a member of the group";
        return CliError::new(Exit::Failure, "client.not_a_member", message)
            .hint("ask an admin of the group to invite you again");
    }
    let error = CliError {
        exit: Exit::Failure,
        code: or(&refusal.code, "client.refused"),
        message: text::line(&refusal.to_string()).to_string(),
        hint: None,
    };
    match refusal.retry_after {
        Some(wait) => error.hint(format!("try again in {} s", wait.as_secs().max(1))),
        None => error,
    }
}

/// Returns the server's code if it has the form of a code, otherwise `fallback`.
fn or(code: &str, fallback: &'static str) -> Cow<'static, str> {
    let is_code = !code.is_empty()
        && code.bytes().all(|b| b.is_ascii_lowercase() || matches!(b, b'.' | b'_'));
    if is_code { code.to_owned().into() } else { fallback.into() }
}

impl From<ConnectError> for CliError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::PinMismatch { expected, seen } => {
                let message = format!(
                    "the server's key is not the pinned one\n  pinned: {expected}\n  seen:   {seen}"
                );
                Self::new(Exit::Untrusted, "client.pin_mismatch", message).hint(
                    "either the operator has changed it, or another party is in between: ask the \
                     operator for the fingerprint and, only if it is the one seen, give it with \
                     --pin (with an account: run `qpq login --pin FINGERPRINT`)",
                )
            }
            ConnectError::Untrusted { reason } => {
                // To some reasons the library adds internal values, which are of no use to a
                // person.
                let reason = reason.split(" {").next().unwrap_or_default();
                let message =
                    format!("the server's certificate is not trusted: {}", text::line(reason));
                Self::new(Exit::Untrusted, "client.untrusted", message).hint(
                    "trust it by --pin and the fingerprint that its operator tells you, or by --ca and a file",
                )
            }
            ConnectError::NotQpq { .. } => Self::new(Exit::Unreachable, "client.not_qpq", error)
                .hint("check the address and the port (--server)"),
            ConnectError::Misconfigured { .. } => {
                Self::new(Exit::Usage, "client.misconfigured", error)
            }
        }
    }
}

impl From<ProfileError> for CliError {
    fn from(error: ProfileError) -> Self {
        let failure = |code, hint: &'static str| Self::new(Exit::Failure, code, &error).hint(hint);
        match error {
            ProfileError::Missing(_) => Self::new(Exit::NotLoggedIn, "profile.missing", error).hint(
                "run `qpq register USERNAME --server HOST:PORT` or, if you have an account, `qpq \
                 login USERNAME --server HOST:PORT`, or choose another profile (`qpq profiles`)",
            ),
            ProfileError::Exists(_) => {
                failure("profile.exists", "use another profile: qpq -p NAME register …")
            }
            ProfileError::InUse(_) => {
                Self::new(Exit::InUse, "profile.in_use", "another qpq is using this profile")
                    .hint("close that one first")
            }
            ProfileError::Unfinished(_) => {
                failure("profile.unfinished", "run `qpq register` again with the same password")
            }
            ProfileError::WrongKey => {
                Self::new(Exit::NotLoggedIn, "profile.wrong_key", "the profile does not open").hint(
                    "run `qpq login`; if that says the same, the password was changed on another \
                     device: link this one again, in another profile: qpq -p NAME device link …",
                )
            }
            ProfileError::Damaged { .. } => {
                failure("profile.damaged", "restore the profile's directory from a backup")
            }
            ProfileError::Io { .. } => {
                failure("profile.io", "check that the directory is yours and the disk has space")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use qpq_client::Status;
    use qpq_client::{Fingerprint, ServerError};

    use super::*;

    fn server(status: Status, code: &str) -> CliError {
        let (message, field) = ("No.\x1b[2J".to_owned(), None);
        let retry_after = Some(Duration::from_millis(2500));
        CallError::Server(ServerError { status, code: code.into(), message, retry_after, field })
            .into()
    }

    #[test]
    fn a_refusal_keeps_its_code_and_cannot_control_the_terminal() {
        let error = server(Status::RateLimited, "delivery.queue_full");
        assert_eq!((error.exit, &*error.code), (Exit::Failure, "delivery.queue_full"));
        assert!(error.message.contains("No.\\u{1b}[2J"), "{}", error.message);
        assert_eq!(error.hint.as_deref(), Some("try again in 2 s"));
        assert_eq!(server(Status::Internal, "not a code\n").code, "client.refused");
    }

    #[test]
    fn an_ended_session_has_the_hint_to_log_in() {
        let error = server(Status::Unauthorized, "auth.session_expired");
        assert_eq!((error.exit, &*error.code), (Exit::NotLoggedIn, "auth.session_expired"));
        assert_eq!(error.hint.as_deref(), Some("run `qpq login`"));
    }

    #[test]
    fn a_hint_names_the_profile_that_was_chosen() {
        let hint = |profile: &str| {
            CliError::not_logged_in().in_profile(&profile.parse().unwrap()).hint.unwrap()
        };
        assert_eq!(hint("alice"), "run `qpq -p alice login`");
        assert_eq!(hint(ProfileName::DEFAULT), "run `qpq login`");
    }

    #[test]
    fn a_changed_certificate_shows_both_fingerprints() {
        let (expected, seen) = (Fingerprint::from([1; 32]), Fingerprint::from([2; 32]));
        let error = CliError::from(ConnectError::PinMismatch { expected, seen });
        assert_eq!(error.exit, Exit::Untrusted);
        assert!(
            error.message.contains(&expected.to_string())
                && error.message.contains(&seen.to_string())
        );
        assert!(error.hint.unwrap().contains("in between"));
    }
}
