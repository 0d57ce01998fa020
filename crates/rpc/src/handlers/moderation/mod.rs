//! Reports, bans and blocks (420 to 426). Times of these messages are Unix seconds.

mod ban_user;
mod block_user;
mod list_banned;
mod list_blocked;
mod list_reports;
mod report_message;
mod unban_user;

use qpq_domain::UnixMillis;

/// Returns an instant in seconds, rounded down.
fn seconds(at: UnixMillis) -> u64 {
    at.0 / 1_000
}
