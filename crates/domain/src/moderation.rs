//! The limits of reports, bans and blocks.

use std::time::Duration;

/// The largest encrypted report, in bytes.
pub const MAX_REPORT: usize = 32 << 10;
/// The maximum length of the conversation id of a report, in bytes.
pub const MAX_CONVERSATION_ID: usize = 64;
/// The maximum length of the reason of a ban, in bytes.
pub const MAX_BAN_REASON: usize = 1 << 10;
/// The maximum number of accounts that one account blocks.
pub const MAX_BLOCKS: usize = 10_000;

/// The limits of stored reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportLimits {
    /// The maximum number of stored reports of one account.
    pub max_per_account: u32,
    /// The time after which a report is removed.
    pub max_age: Duration,
}

impl Default for ReportLimits {
    fn default() -> Self {
        Self { max_per_account: 1_000, max_age: Duration::from_secs(180 * 24 * 60 * 60) }
    }
}
