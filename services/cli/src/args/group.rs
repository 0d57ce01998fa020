//! The arguments of `qpq group`.

use clap::Subcommand;
use qpq_client::Username;

use super::BanDuration;

#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// Create a group, whose admin you are
    ///
    /// Example:
    ///   qpq group create friends bob carol
    #[command(verbatim_doc_comment)]
    Create {
        /// The group's name
        name: String,
        /// The first members
        members: Vec<Username>,
    },
    /// Add members to a group that you are an admin of
    #[command(visible_alias = "add")]
    Invite {
        /// The group's name, or the beginning of its id
        group: String,
        #[arg(required = true)]
        members: Vec<Username>,
    },
    /// Remove members from a group that you are an admin of
    Remove {
        /// The group's name, or the beginning of its id
        group: String,
        #[arg(required = true)]
        members: Vec<Username>,
    },
    /// Remove a member from a group, and refuse it there from then on
    ///
    /// Nobody can add the user again before the ban ends. Another ban replaces the
    /// reason and the end.
    ///
    /// Example:
    ///   qpq group ban friends mallory --reason spam --for 7d
    #[command(verbatim_doc_comment)]
    Ban {
        /// The group's name, or the beginning of its id
        group: String,
        /// The user, a member or not
        member: Username,
        /// The reason, which admins and the server can read
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
        /// The duration, such as 90s, 12h or 7d [default: no end]
        #[arg(long = "for", value_name = "DURATION")]
        duration: Option<BanDuration>,
    },
    /// End the ban of a user from a group that you are an admin of
    Unban {
        /// The group's name, or the beginning of its id
        group: String,
        /// The user
        member: Username,
    },
    /// List the users that are banned from a group that you are an admin of
    Bans {
        /// The group's name, or the beginning of its id
        group: String,
    },
    /// Rename a group that you are an admin of
    Rename {
        /// The group's name, or the beginning of its id
        group: String,
        /// The new name
        name: String,
    },
    /// Promote a member of a group to admin
    ///
    /// Admins add and remove members, rename the group, and promote members.
    #[command(verbatim_doc_comment)]
    Admin {
        /// The group's name, or the beginning of its id
        group: String,
        member: Username,
        /// Demote an admin to an ordinary member
        #[arg(long)]
        revoke: bool,
    },
    /// Join a group again whose messages this device can no longer read
    ///
    /// The other members see that you joined again. Their clients are asked to repeat
    /// the messages that were sent meanwhile.
    #[command(verbatim_doc_comment)]
    Rejoin {
        /// The group's name, or the beginning of its id
        group: String,
    },
    /// Ask all members of a group to renew their keys
    Rotate {
        /// The group's name, or the beginning of its id
        group: String,
        /// The reason, which the server can read
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Send one message to a group
    Send {
        /// The group's name, or the beginning of its id
        group: String,
        /// The text; `-`, or nothing, reads it from standard input
        #[arg(allow_hyphen_values = true)]
        text: Option<String>,
    },
    /// Leave a group
    ///
    /// Later messages of the group are not shown. The members see you leave once the
    /// client of an admin has read the request. If you are the only admin, the oldest
    /// other member becomes one.
    #[command(verbatim_doc_comment)]
    Leave {
        /// The group's name, or the beginning of its id
        group: String,
    },
    /// List your groups
    List,
    /// Show a group: its members, their devices, and who is an admin
    Show {
        /// The group's name, or the beginning of its id
        group: String,
    },
    /// List a group's members
    Members {
        /// The group's name, or the beginning of its id
        group: String,
    },
}
