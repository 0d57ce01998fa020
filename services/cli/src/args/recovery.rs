//! The arguments of `qpq recovery`.

use std::path::PathBuf;

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum RecoveryCommand {
    /// Store a recovery bundle, and show its recovery code once
    ///
    /// With the bundle, `qpq login USERNAME` on a new machine brings the account back:
    /// its key, contacts and conversations, without their history. It opens with your
    /// password or with the code. Write the code down. An earlier code stops working.
    ///
    /// This device keeps the bundle up to date from now on. Always asks for the
    /// password.
    #[command(verbatim_doc_comment)]
    Show,
    /// Check that a recovery code and the password open the stored bundle
    ///
    /// Asks for the password and the code. The server allows this ten times a day.
    #[command(verbatim_doc_comment)]
    Verify {
        /// File of the code; without it, the terminal
        #[arg(long, value_name = "FILE")]
        code_file: Option<PathBuf>,
    },
    /// Show whether this device keeps a recovery bundle up to date
    Status,
    /// Remove the bundle from the server; always asks for the password
    Remove,
}
