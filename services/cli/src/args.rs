//! The command line: every command, option and environment variable, with the text that `qpq help`
//! shows.

mod account;
mod device;
mod group;
mod moderate;
mod recovery;

use std::{fmt, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use qpq_client::{FIRST_DEVICE, Fingerprint, IdentityKey, Username};

pub(crate) use self::{
    account::AccountCommand,
    device::DeviceCommand,
    group::GroupCommand,
    moderate::{BanDuration, ModerateCommand},
    recovery::RecoveryCommand,
};

const AFTER_HELP: &str = "\
Examples:
  qpq register alice --server chat.example.org:5001
  qpq dm bob
  echo 'backup done' | qpq send bob -
  qpq recv --follow --json

Two people on one machine, each with a profile:
  qpq -p alice register alice --server 127.0.0.1:5001
  qpq -p bob   register bob   --server 127.0.0.1:5001
  qpq -p alice dm bob

Exit codes:
  0    done
  1    refused or failed; the message says why
  2    the command line is wrong
  3    not logged in, or the password is wrong
  4    the server cannot be reached
  5    the server is not the one that is trusted
  6    the profile is in use by another qpq
  7    nothing arrived in time (recv --timeout)
  130  interrupted
  141  standard output is no longer read";

/// The maximum waiting time, in seconds: a year.
const MAX_SECONDS: u64 = 365 * 24 * 60 * 60;

// Help is shown exactly as written here. A line has at most 80 columns. The first one, which lists
// show, has no full stop.

/// End-to-end encrypted chat over QUIC
///
/// Messages are encrypted with MLS between you and the other members: the server
/// passes them on and cannot read them. Your password never leaves this machine.
#[derive(Debug, Parser)]
#[command(name = "qpq", version, after_help = AFTER_HELP, verbatim_doc_comment)]
#[command(arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Which account to use [env: QPQ_PROFILE]
    #[arg(short, long, global = true, value_name = "NAME", env = "QPQ_PROFILE")]
    #[arg(default_value = ProfileName::DEFAULT, hide_env = true, hide_default_value = true, help_heading = "Account")]
    pub(crate) profile: ProfileName,
    /// Directory of the profiles [env: QPQ_HOME]
    #[arg(long, global = true, value_name = "DIR", env = "QPQ_HOME", hide_env = true)]
    #[arg(help_heading = "Account")]
    pub(crate) home: Option<PathBuf>,
    /// File of the password [env: QPQ_PASSWORD, itself]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Account")]
    pub(crate) password_file: Option<PathBuf>,
    /// Server to register with [env: QPQ_SERVER]
    #[arg(long, global = true, value_name = "HOST:PORT", help_heading = "Server")]
    pub(crate) server: Option<String>,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    /// One JSON object per line; errors as JSON on standard error
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Say more, on standard error; -vv says much more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    pub(crate) verbose: u8,
}

/// The key that a server must have, or two of which it must have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pins {
    One(Fingerprint),
    Either([Fingerprint; 2]),
}

fn pins(text: &str) -> Result<Pins, String> {
    let pins: Vec<Fingerprint> = text
        .split(',')
        .map(|pin| pin.trim().parse())
        .collect::<Result<_, _>>()
        .map_err(|error: qpq_client::ParseFingerprintError| error.to_string())?;
    match pins[..] {
        [one] => Ok(Pins::One(one)),
        [one, other] => Ok(Pins::Either([one, other])),
        _ => Err("two fingerprints at most".to_owned()),
    }
}

/// How the server proves who it is. Without any of these its certificate is pinned at first use.
#[derive(Debug, Args)]
pub(crate) struct TrustArgs {
    /// Trust the server key with this SHA-256, or either
    #[arg(long, global = true, value_name = "PIN[,PIN]")]
    #[arg(conflicts_with_all = ["ca", "system_roots"], value_parser = pins)]
    #[arg(help_heading = "Server")]
    pub(crate) pin: Option<Pins>,
    /// Trust the authorities in this file (PEM or DER)
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        conflicts_with = "system_roots",
        help_heading = "Server"
    )]
    pub(crate) ca: Option<PathBuf>,
    /// Trust the authorities that the system trusts
    #[arg(long, global = true, help_heading = "Server")]
    pub(crate) system_roots: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create an account on a server, and log in
    ///
    /// The account lives in a profile on this machine, encrypted with your password.
    /// Nobody can reset that password.
    ///
    /// The server's certificate is pinned. Compare the fingerprint that is shown with
    /// the one that the server printed at its start, or give that one with --pin.
    ///
    /// If the server needs an invite for a new account, ask its operator for a code.
    ///
    /// Examples:
    ///   qpq register alice --server 127.0.0.1:5001
    ///   qpq register alice --server chat.example.org:5001 --invite CODE
    #[command(verbatim_doc_comment)]
    Register {
        /// 1 to 64 letters, digits and marks; case does not matter
        username: Username,
        /// The name of this device, which others see
        #[arg(long, value_name = "NAME", default_value = FIRST_DEVICE, hide_default_value = true)]
        device: String,
        /// The code of an invite, if the server needs one
        #[arg(long, value_name = "CODE")]
        invite: Option<String>,
    },
    /// Log in, until `qpq logout` or the next reboot
    ///
    /// Asks for the password once. The key that opens the profile is then kept in
    /// memory ($XDG_RUNTIME_DIR or /dev/shm, readable by you alone), so that other
    /// commands need no password.
    ///
    /// If the server has moved or has a new certificate, name it once:
    ///   qpq login --server HOST:PORT --pin FINGERPRINT
    ///
    /// On a machine without the account, brings it back from its recovery bundle, if
    /// there is one (`qpq recovery show`), and makes this machine a new device:
    ///   qpq login alice --server HOST:PORT
    #[command(verbatim_doc_comment)]
    Login {
        /// The account, if this machine does not have it
        username: Option<Username>,
        /// Name of this device, if it is a new one
        #[arg(long, value_name = "NAME", default_value = "restored device")]
        #[arg(hide_default_value = true, requires = "username")]
        device: String,
        /// Ask for the recovery code, too
        #[arg(long, requires = "username")]
        recovery_code: bool,
        /// File of the recovery code
        #[arg(long, value_name = "FILE", requires = "username")]
        recovery_code_file: Option<PathBuf>,
    },
    /// End the session and forget the key
    ///
    /// Account and messages stay on this machine, encrypted. Without a connection the
    /// key is forgotten all the same, and the command reports that the session was not
    /// ended.
    #[command(verbatim_doc_comment)]
    Logout {
        /// End every session of the account, on other machines too
        #[arg(long)]
        all: bool,
    },
    /// Change the password, and end all other sessions
    ///
    /// Asks for the present password, then twice for the new one. The profile on this
    /// machine opens with the new password from then on.
    ///
    /// Your other devices have to log in again: run `qpq login` there before they are
    /// restarted or logged out, or link them again with `qpq device link`.
    #[command(verbatim_doc_comment)]
    Passwd {
        /// File of the new password
        #[arg(long, value_name = "FILE")]
        new_password_file: Option<PathBuf>,
    },
    /// Show who you are, where, and whether you are logged in
    Whoami,
    /// Export or delete your account
    #[command(subcommand)]
    Account(AccountCommand),
    /// Show the health of the server; needs no account
    Health,
    /// Chat with a user or a group
    ///
    /// Each line that you type is sent; incoming messages appear as they arrive. Arrow
    /// keys edit, and bring back earlier lines. /help lists what else can be typed,
    /// /quit or Ctrl-D ends.
    ///
    /// In scripts, when standard input or output is not a terminal, each line of
    /// standard input is sent and each incoming message printed, until the input ends.
    #[command(verbatim_doc_comment)]
    Dm {
        /// A user, or a group that you are in; @bob is always the user
        #[arg(value_name = "USER|GROUP")]
        to: Recipient,
        /// In scripts: stay this long after the input has ended
        #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
        #[arg(value_parser = clap::value_parser!(u64).range(..=MAX_SECONDS))]
        linger: u64,
    },
    /// Send one message to a user or a group
    ///
    /// A file is encrypted on this machine, with a key that only the receivers get. If
    /// sending is interrupted, the same command continues where it stopped.
    ///
    /// Examples:
    ///   qpq send bob 'see you at eight'
    ///   date | qpq send bob -
    ///   qpq send bob --file photo.jpg
    #[command(verbatim_doc_comment)]
    Send {
        /// A user, or a group that you are in; @bob is always the user
        to: Recipient,
        /// The text; `-`, or nothing, reads it from standard input
        #[arg(allow_hyphen_values = true)]
        text: Option<String>,
        /// Send this file instead of a text; at most about 50 MiB
        #[arg(long, value_name = "PATH", conflicts_with = "text")]
        file: Option<PathBuf>,
    },
    /// Save a file that was sent in a conversation
    ///
    /// The newest file of the conversation is number 1, the one before it number 2.
    /// The server keeps a file for 90 days.
    ///
    /// Examples:
    ///   qpq save bob
    ///   qpq save bob 2 --to pictures/
    #[command(verbatim_doc_comment)]
    Save {
        /// A user, or a group that you are in; @bob is always the user
        #[arg(value_name = "USER|GROUP")]
        from: Recipient,
        /// Which file, counted from the newest
        #[arg(default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        number: u32,
        /// The file or directory to write to; else the current directory
        #[arg(long, value_name = "PATH")]
        to: Option<PathBuf>,
        /// Replace a file that exists
        #[arg(long)]
        force: bool,
    },
    /// Show received messages that were not shown before
    ///
    /// Examples:
    ///   qpq recv                  waiting messages
    ///   qpq recv --timeout 60     waiting messages, or the first to arrive in 60 s
    ///   qpq recv --follow --json  everything from now on, for a program
    #[command(verbatim_doc_comment)]
    Recv {
        /// Keep running and show new messages
        #[arg(short, long)]
        follow: bool,
        /// Wait at most this long; with --follow: end after it
        #[arg(short, long, value_name = "SECONDS")]
        #[arg(value_parser = clap::value_parser!(u64).range(..=MAX_SECONDS))]
        timeout: Option<u64>,
    },
    /// Create and use groups
    #[command(subcommand)]
    Group(GroupCommand),
    /// Link, list and revoke your devices
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Prepare for the loss of all your devices
    #[command(subcommand)]
    Recovery(RecoveryCommand),
    /// Show your keys, or compare them with another user's
    ///
    /// A safety number is the same on both sides if and only if nobody, not even the
    /// server, stands between you: read it to each other on the phone.
    ///
    /// Examples:
    ///   qpq keys                 your fingerprint, and your stock of key packages
    ///   qpq keys bob             the safety number between you and bob
    ///   qpq keys bob --verified  you have compared it, and it is the same
    ///   qpq keys bob --accept    bob confirmed that the new key is theirs
    #[command(verbatim_doc_comment)]
    Keys {
        /// The user to compare with
        user: Option<Username>,
        /// Note that you compared the number with theirs
        #[arg(long, requires = "user")]
        verified: bool,
        /// Accept a new key of theirs; only after you have asked them
        #[arg(long, requires = "user")]
        accept: bool,
    },
    /// Refuse the messages of a user
    ///
    /// The server refuses new messages from the user, and groups created by the user
    /// are not joined. The user is not notified, and sees that messages are refused.
    /// Earlier messages stay.
    ///
    /// Without a connection, the user is blocked on this machine. The server is
    /// informed by the next `qpq recv`.
    ///
    /// Examples:
    ///   qpq block mallory
    ///   qpq block --key 9f31a2b3…    the identity in full, as --json shows it
    #[command(verbatim_doc_comment)]
    Block(PersonArg),
    /// Accept the messages of a user again
    ///
    /// Messages sent while the user was blocked are lost, and so are groups that the
    /// user added you to.
    #[command(verbatim_doc_comment)]
    Unblock(PersonArg),
    /// List the users whose messages are refused
    Blocked,
    /// List requests: groups of strangers, which wait for your decision
    ///
    /// A stranger is a person you never wrote to. You are in the group of a stranger
    /// only after you accept the request.
    #[command(verbatim_doc_comment)]
    Requests,
    /// Accept the requests of a user, or the request for a group
    ///
    /// The user is an acquaintance from then on.
    ///
    /// Examples:
    ///   qpq accept alice       all requests of alice
    ///   qpq accept 4f31a2b3    one request, by the id that `qpq requests` shows
    #[command(verbatim_doc_comment)]
    Accept {
        /// A user, or the name or id of a group; @bob is always the user
        #[arg(value_name = "USER|GROUP")]
        which: Recipient,
    },
    /// Decline the requests of a user, or the request for a group
    ///
    /// The user is not notified, and can ask again. `qpq block` prevents that.
    #[command(verbatim_doc_comment)]
    Decline {
        /// A user, or the name or id of a group; @bob is always the user
        #[arg(value_name = "USER|GROUP")]
        which: Recipient,
    },
    /// Ban users from the server, and read reports; for administrators
    #[command(subcommand)]
    Moderate(ModerateCommand),
    /// List the profiles on this machine
    Profiles,
    /// Print the completions for bash, zsh, fish, elvish or powershell
    ///
    /// Example:
    ///   qpq completions bash > ~/.local/share/bash-completion/completions/qpq
    #[command(verbatim_doc_comment)]
    Completions {
        /// The shell
        #[arg(hide_possible_values = true)]
        shell: Shell,
    },
}

/// A person, by name or key.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PersonArg {
    /// The user
    pub(crate) user: Option<Username>,
    /// The user's identity instead of a name
    #[arg(long, value_name = "IDENTITY", value_parser = identity)]
    pub(crate) key: Option<IdentityKey>,
}

fn identity(text: &str) -> Result<IdentityKey, &'static str> {
    let digit = |place| text.get(place..place + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(digit).collect();
    bytes
        .filter(|_| text.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|bytes| IdentityKey::try_from(&bytes[..]).ok())
        .ok_or("an identity has 64 hexadecimal digits")
}

/// The recipient of `send`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Recipient {
    /// `@bob`: certainly a user.
    User(Username),
    /// `bob`: a user or a group, whichever there is.
    Either(String),
}

impl FromStr for Recipient {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix('@') {
            Some(name) => name
                .parse()
                .map(Self::User)
                .map_err(|error: <Username as FromStr>::Err| error.to_string()),
            None => Ok(Self::Either(text.to_owned())),
        }
    }
}

/// A profile's name, which is a safe file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ProfileName(String);

impl ProfileName {
    /// The name that is used if none is given.
    pub(crate) const DEFAULT: &str = "default";

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the command that logs in to this profile.
    pub(crate) fn login(&self) -> String {
        match self.as_str() {
            Self::DEFAULT => "qpq login".to_owned(),
            name => format!("qpq -p {name} login"),
        }
    }
}

impl FromStr for ProfileName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty()
            || text.len() > 64
            || text.starts_with('.')
            || !text.chars().all(is_plain)
        {
            return Err(
                "a profile's name has 1 to 64 letters, digits, '-', '_' and '.', and no '.' in front",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn clap_accepts_the_definition_of_the_commands() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_help_is_wider_than_a_terminal() {
        fn check(command: &mut clap::Command) {
            for help in [command.render_help(), command.render_long_help()] {
                for line in help.to_string().lines() {
                    assert!(line.chars().count() <= 80, "{}: {line}", command.get_name());
                }
            }
            command.get_subcommands_mut().for_each(check);
        }
        let mut command = Cli::command();
        command.build();
        check(&mut command);
    }

    #[test]
    fn global_options_go_before_or_after_the_command() {
        for line in ["qpq -p bob --server a:1 send carol -", "qpq send carol - --server a:1 -p bob"]
        {
            let cli = parse(line).unwrap();
            assert_eq!(cli.global.profile.as_str(), "bob");
            assert_eq!(cli.global.server.as_deref(), Some("a:1"));
            let Command::Send { to, text, .. } = cli.command else { panic!("{line}") };
            assert_eq!((to, text.as_deref()), (Recipient::Either("carol".into()), Some("-")));
        }
    }

    #[test]
    fn a_text_with_a_hyphen_and_a_recipient_with_an_at_sign_are_parsed() {
        let Command::Send { to, text, .. } = parse("qpq send @Bob -5").unwrap().command else {
            panic!()
        };
        assert_eq!(to, Recipient::User("bob".parse().unwrap()));
        assert_eq!(text.as_deref(), Some("-5"));
    }

    #[test]
    fn a_time_to_wait_is_at_most_a_year() {
        for line in ["qpq recv --timeout", "qpq dm bob --linger"] {
            assert!(parse(&format!("{line} 31536000")).is_ok());
            for bad in ["31536001", "18446744073709551615", "18446744073709551616", "-1", "1.5"] {
                assert!(parse(&format!("{line} {bad}")).is_err(), "{line} {bad}");
            }
        }
    }

    #[test]
    fn more_than_one_kind_of_trust_is_refused() {
        let pin = "ab".repeat(32);
        assert!(parse(&format!("qpq health --pin {pin}")).is_ok());
        assert!(parse(&format!("qpq health --pin {pin} --ca ca.pem")).is_err());
        assert!(parse(&format!("qpq health --pin {pin} --system-roots")).is_err());
        assert!(parse("qpq health --ca ca.pem --system-roots").is_err());
        assert!(parse("qpq health --pin abc").is_err());
    }

    #[test]
    fn profile_names_that_are_not_plain_file_names_are_refused() {
        for good in ["default", "a", "work-2.b_c"] {
            assert_eq!(good.parse::<ProfileName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "ü", &"x".repeat(65)] {
            assert!(bad.parse::<ProfileName>().is_err(), "{bad}");
        }
    }
}
