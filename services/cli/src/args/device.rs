//! The arguments of `qpq device`.

use clap::Subcommand;
use qpq_client::{LINK_REQUEST_LIFETIME, LinkCode, Username};

/// The maximum waiting time of a new device, in seconds: the lifetime of its request.
const MAX_LINK_SECONDS: u64 = LINK_REQUEST_LIFETIME.as_secs();

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Make this machine a device of an account that you have
    ///
    /// Shows a code and waits until a device of yours approves it. The profile must
    /// have no account yet. Later messages reach both devices.
    ///
    /// Example:
    ///   qpq device link --name laptop alice --server chat.example.org:5001
    #[command(verbatim_doc_comment)]
    Link {
        /// The account
        username: Username,
        /// The name of this device, which others see
        #[arg(long)]
        name: String,
        /// The longest time to wait [default: 600]
        #[arg(short, long, value_name = "SECONDS", default_value_t = 600)]
        #[arg(hide_default_value = true)]
        #[arg(value_parser = clap::value_parser!(u64).range(1..=MAX_LINK_SECONDS))]
        timeout: u64,
    },
    /// Approve a new device that shows this code
    ///
    /// Without a code, lists the devices that ask to be linked. Always asks for the
    /// password. A device that you approve reads and writes as you.
    #[command(verbatim_doc_comment)]
    Approve {
        /// The code that the new device shows
        code: Option<LinkCode>,
    },
    /// List your devices
    List,
    /// Rename this device
    Rename {
        /// The new name
        name: String,
    },
    /// Revoke another device of yours: one that is lost, sold or stolen
    ///
    /// The device's sessions end, and your conversations remove the device. The device
    /// keeps the messages that it has received, and the key of your account.
    #[command(verbatim_doc_comment)]
    Revoke {
        /// The device's name, or the beginning of its id
        #[arg(value_name = "NAME|ID")]
        device: String,
    },
}
