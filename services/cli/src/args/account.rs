//! The arguments of `qpq account`.

use std::path::PathBuf;

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum AccountCommand {
    /// Delete the account on the server permanently
    ///
    /// Asks for the password, and for the name of the account on standard input. Leaves
    /// your groups first. Then the server erases the account, its keys and devices, and
    /// the messages that wait for it. Messages that you have sent stay with the people
    /// who received them. Nobody can register with the same key again, and nobody with
    /// the same name for 90 days.
    ///
    /// The profile on this machine is removed too. Make a copy before:
    ///   qpq account export
    #[command(verbatim_doc_comment)]
    Delete {
        /// Keep the profile, and so the messages, on this machine
        #[arg(long)]
        keep_profile: bool,
    },
    /// Write everything that this device has to a file, readable
    ///
    /// One JSON object per line: the account, its devices, the people you know, your
    /// conversations and all their messages. The file is NOT encrypted; you alone can
    /// read it (mode 0600). It contains no secret keys, and cannot be imported.
    #[command(verbatim_doc_comment)]
    Export {
        /// The file, which must not exist [default: qpq-USERNAME.jsonl]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}
