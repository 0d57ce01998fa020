//! What can be typed: every command, option and environment variable, with the help that `qpq help` shows.

use std::{fmt, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use qpq_client::{Fingerprint, Username};

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
  0  done
  1  refused or failed; the message says why
  2  the command line is wrong
  3  not logged in, or the password is wrong
  4  the server cannot be reached
  5  the server is not the one that is trusted
  6  the profile is in use by another qpq
  7  nothing arrived in time (recv --timeout)
  130  interrupted";

/// End-to-end encrypted chat over QUIC.
///
/// Messages are encrypted with MLS between you and whom you write to: the server passes them on and cannot read them. Your
/// password never leaves this machine.
#[derive(Debug, Parser)]
#[command(name = "qpq", version, after_help = AFTER_HELP, max_term_width = 100)]
#[command(arg_required_else_help = true, disable_help_subcommand = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Whose account to use, where one machine has several.
    #[arg(short, long, global = true, value_name = "NAME", env = "QPQ_PROFILE", default_value = "default")]
    #[arg(help_heading = "Account")]
    pub(crate) profile: ProfileName,
    /// Where profiles are kept [default: $XDG_DATA_HOME/qpq or ~/.local/share/qpq].
    #[arg(long, global = true, value_name = "DIR", env = "QPQ_HOME", help_heading = "Account")]
    pub(crate) home: Option<PathBuf>,
    /// Read the password from the first line of this file instead of asking for it (see also QPQ_PASSWORD).
    #[arg(long, global = true, value_name = "FILE", help_heading = "Account")]
    pub(crate) password_file: Option<PathBuf>,
    /// The server; the port is 5001 unless given. Remembered by the profile, so `register` needs it (or QPQ_SERVER),
    /// `health` may, and `login` when the server has moved.
    #[arg(long, global = true, value_name = "HOST:PORT", help_heading = "Server")]
    pub(crate) server: Option<String>,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    /// Write one JSON object per line, and errors as JSON on standard error.
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Say more about what happens, on standard error; -vv says much more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    pub(crate) verbose: u8,
}

/// How the server proves who it is. Without any of these its certificate is pinned at first use.
#[derive(Debug, Args)]
pub(crate) struct TrustArgs {
    /// Trust the server whose certificate has this SHA-256 fingerprint, which the server prints when it starts.
    #[arg(long, global = true, value_name = "FINGERPRINT", conflicts_with_all = ["ca", "system_roots"])]
    #[arg(help_heading = "Server")]
    pub(crate) pin: Option<Fingerprint>,
    /// Trust a server whose certificate the authorities in this file (PEM or DER) have issued.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        conflicts_with = "system_roots",
        help_heading = "Server"
    )]
    pub(crate) ca: Option<PathBuf>,
    /// Trust a server whose certificate the system's authorities have issued.
    #[arg(long, global = true, help_heading = "Server")]
    pub(crate) system_roots: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an account on a server, and log in.
    ///
    /// The account lives in a profile on this machine, encrypted with your password. Nobody can reset that password.
    /// The server's certificate is pinned: compare the fingerprint with the one that the server printed, or give it with
    /// --pin.
    ///
    /// Example: qpq register alice --server 127.0.0.1:5001
    Register {
        /// 1 to 64 letters, digits and punctuation marks; case does not matter.
        username: Username,
    },
    /// Log in, and stay logged in until `qpq logout` or the next reboot.
    ///
    /// Asks for the password once. The key that opens the profile is then kept in memory ($XDG_RUNTIME_DIR or /dev/shm,
    /// readable by you alone), so that other commands need no password.
    Login,
    /// Log out: end the session on the server and forget the key that opens the profile.
    ///
    /// Account and messages stay on this machine, encrypted. Without a connection the key is forgotten all the same,
    /// and it says that the session could not be ended.
    Logout {
        /// End every session of the account, on other machines too.
        #[arg(long)]
        all: bool,
    },
    /// Show who you are, on which server, and whether you are logged in.
    Whoami,
    /// Ask the server how it is. Needs no account.
    Health,
    /// Chat with somebody: type lines, see theirs as they come.
    ///
    /// Arrow keys edit and bring back earlier lines; /help lists what else can be typed; /quit or Ctrl-D ends. When
    /// standard input is not a terminal its lines are sent and incoming ones printed, until it ends.
    Dm {
        /// Whom to chat with.
        user: Username,
        /// Stay this many seconds after standard input has ended (when it is not a terminal), for answers.
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        linger: u64,
    },
    /// Send one message to a user or a group.
    ///
    /// Examples:
    ///   qpq send bob 'see you at eight'
    ///   date | qpq send bob -
    #[command(verbatim_doc_comment)]
    Send {
        /// A user, or a group that you are in. `@bob` is always the user.
        to: Recipient,
        /// The text; `-`, or nothing, reads it from standard input.
        #[arg(allow_hyphen_values = true)]
        text: Option<String>,
    },
    /// Show messages that have come and were not shown before.
    Recv {
        /// Go on showing messages as they come, until interrupted.
        #[arg(short, long)]
        follow: bool,
        /// Wait at most this long for a message. With --follow: end after this time.
        #[arg(short, long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Make and use groups.
    #[command(subcommand)]
    Group(GroupCommand),
    /// Show your keys, or compare them with somebody's.
    ///
    /// A safety number is the same on both sides if and only if no server stands between you: read it to each other on
    /// the phone.
    ///
    /// Examples:
    ///   qpq keys        your fingerprint, and how many key packages the server still has of you
    ///   qpq keys bob    the safety number between you and bob
    #[command(verbatim_doc_comment)]
    Keys {
        /// With whom to compare.
        user: Option<Username>,
        /// Take the server's word for a key of theirs that has changed: only after you have asked them.
        #[arg(long, requires = "user")]
        accept: bool,
    },
    /// List the profiles on this machine.
    Profiles,
    /// Print the completions for a shell.
    ///
    /// Example: qpq completions bash > ~/.local/share/bash-completion/completions/qpq
    Completions { shell: Shell },
}

#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// Make a group, with yourself as its maker: the one who can add members.
    ///
    /// Example: qpq group create friends bob carol
    Create {
        name: String,
        /// Whom to add at once.
        members: Vec<Username>,
    },
    /// Add people to a group that you made.
    Add {
        /// The group's name, or the beginning of its id.
        group: String,
        #[arg(required = true)]
        members: Vec<Username>,
    },
    /// Send one message to a group.
    Send {
        /// The group's name, or the beginning of its id.
        group: String,
        /// The text; `-`, or nothing, reads it from standard input.
        #[arg(allow_hyphen_values = true)]
        text: Option<String>,
    },
    /// List your groups.
    List,
    /// List a group's members.
    Members {
        /// The group's name, or the beginning of its id.
        group: String,
    },
}

/// To whom `send` sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Recipient {
    /// `@bob`: certainly a user.
    User(Username),
    /// `bob`: whichever there is.
    Either(String),
}

impl FromStr for Recipient {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix('@') {
            Some(name) => {
                name.parse().map(Self::User).map_err(|error: <Username as FromStr>::Err| error.to_string())
            }
            None => Ok(Self::Either(text.to_owned())),
        }
    }
}

/// A profile's name; a safe file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ProfileName(String);

impl ProfileName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProfileName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > 64 || text.starts_with('.') || !text.chars().all(is_plain) {
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
    fn the_commands_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_go_before_and_behind_the_command() {
        for line in ["qpq -p bob --server a:1 send carol -", "qpq send carol - --server a:1 -p bob"] {
            let cli = parse(line).unwrap();
            assert_eq!(cli.global.profile.as_str(), "bob");
            assert_eq!(cli.global.server.as_deref(), Some("a:1"));
            let Command::Send { to, text } = cli.command else { panic!("{line}") };
            assert_eq!((to, text.as_deref()), (Recipient::Either("carol".into()), Some("-")));
        }
    }

    #[test]
    fn a_text_may_begin_with_a_hyphen_and_a_recipient_be_surely_a_user() {
        let Command::Send { to, text } = parse("qpq send @Bob -5").unwrap().command else { panic!() };
        assert_eq!(to, Recipient::User("bob".parse().unwrap()));
        assert_eq!(text.as_deref(), Some("-5"));
    }

    #[test]
    fn only_one_kind_of_trust_at_a_time() {
        let pin = "ab".repeat(32);
        assert!(parse(&format!("qpq health --pin {pin}")).is_ok());
        assert!(parse(&format!("qpq health --pin {pin} --ca ca.pem")).is_err());
        assert!(parse(&format!("qpq health --pin {pin} --system-roots")).is_err());
        assert!(parse("qpq health --ca ca.pem --system-roots").is_err());
        assert!(parse("qpq health --pin abc").is_err());
    }

    #[test]
    fn profile_names_are_file_names_without_surprises() {
        for good in ["default", "a", "work-2.b_c"] {
            assert_eq!(good.parse::<ProfileName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "ü", &"x".repeat(65)] {
            assert!(bad.parse::<ProfileName>().is_err(), "{bad}");
        }
    }
}
