//! ListBanned (424).

use bytes::Bytes;
use qpq_ports::Ban;
use qpq_proto::{methods, v1};

use super::seconds;
use crate::{Cx, Handled, Handler, ModeratingCaller};

/// The maximum number of bans in an answer.
const MAX_BANS: u32 = 10_000;

/// The maximum size of the bans in an answer, in bytes.
const MAX_BYTES: usize = 3 << 20;

/// The maximum size of a ban without its reason, in bytes.
const BAN_BYTES: usize = 80;

impl Handler for methods::ListBanned {
    fn answer_bytes(_: &v1::ListBannedRequest) -> usize {
        MAX_BYTES
    }

    /// Returns the newest bans, as many as fit an answer.
    async fn handle(
        cx: Cx<'_>,
        caller: ModeratingCaller,
        _: v1::ListBannedRequest,
    ) -> Handled<Self> {
        let bans = &cx.app.stores.bans;
        let bans = bans.list(caller.scope(), caller.moderator(), MAX_BANS, cx.now).await??;
        let mut bytes = 0;
        let fits = |ban: &Ban| {
            bytes += ban.reason.len() + BAN_BYTES;
            bytes <= MAX_BYTES
        };
        let users = bans.into_iter().take_while(fits).map(listed).collect();
        Ok(v1::ListBannedResponse { users }.into())
    }
}

fn listed(ban: Ban) -> v1::BannedUserEntry {
    v1::BannedUserEntry {
        identity_key: Bytes::copy_from_slice(ban.identity.as_bytes()),
        reason: ban.reason,
        banned_at: seconds(ban.banned_at),
        // 0 stands for a permanent ban.
        expires_at: ban.expires_at.map_or(0, |at| seconds(at).max(1)),
    }
}
