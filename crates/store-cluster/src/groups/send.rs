//! The transaction of a message to a group, and of its commit.
//!
//! The group is locked before the heads of the inboxes. Of concurrent commits for one epoch, the
//! first to lock the group is accepted. The others find a later epoch and write nothing. A commit
//! with a message id is remembered with its result for [`REMEMBERED`], so that a repeat gets that
//! result and is not refused for its stale epoch.

use std::time::Duration;

use qpq_domain::{DeliveryLimits, IdentityKey, UnixMillis};
use qpq_ports::{Commit, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, NewMessage};
use sqlx::PgConnection;

use super::{Locked, lock, role_of};
use crate::{
    bans,
    error::NeverWritten,
    inboxes::{Accept, Outcomes, accept},
    postgres::{
        ClusterMark, Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of, number},
    },
    time::Time,
};

/// Time for which an accepted commit is remembered. Clients stop repeating an unanswered call
/// earlier.
pub(super) const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Returns the epoch and the result of a remembered commit. Commits up to the instant $4 are
/// forgotten.
const FIRST_RESULT: &str = "
    SELECT epoch, outcome FROM group_commit
     WHERE group_id = $1 AND account = $2 AND message_id = $3 AND committed_at > $4";

/// Reads the members, without deleted accounts, which have no inbox.
const ALL: &str = "
    SELECT a.identity
      FROM group_member m JOIN account a ON a.id = m.account JOIN inbox i ON i.id = m.account
     WHERE m.group_id = $1 ORDER BY m.account";

/// Reads the members, the sender $2 only if it has another device than $3. See [`ALL`].
const OTHERS: &str = "
    SELECT a.identity
      FROM group_member m JOIN account a ON a.id = m.account JOIN inbox i ON i.id = m.account
     WHERE m.group_id = $1
       AND (m.account <> $2
            OR EXISTS (SELECT 1 FROM device d
                        WHERE d.account = $2 AND d.device IS DISTINCT FROM $3))
     ORDER BY m.account";

const RAISE_EPOCH: &str = "
    UPDATE mls_group SET epoch = $2, group_info = coalesce($3, group_info) WHERE id = $1";

/// Stores a commit. Replaces a forgotten one with the same id that no sweep has removed yet.
const REMEMBER: &str = "
    INSERT INTO group_commit (group_id, account, message_id, epoch, committed_at, outcome)
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (group_id, account, message_id) DO UPDATE
       SET epoch = excluded.epoch, committed_at = excluded.committed_at,
           outcome = excluded.outcome";

/// Removes commits that are older than [`REMEMBERED`], 604 800 000 ms. $1 now, $2 rows.
pub(crate) const FORGET_COMMITS: &str = "
    DELETE FROM group_commit WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM group_commit
         WHERE committed_at <= (SELECT least($1, store_now()) - 604800000)
         ORDER BY committed_at LIMIT $2 FOR UPDATE SKIP LOCKED))";
const _: () = assert!(REMEMBERED.as_millis() == 604_800_000);

/// Accepts a message of a member for its recipients, and its commit if it has one.
pub(super) struct SendToGroup<'a> {
    pub(super) message: &'a GroupMessage,
    pub(super) limits: &'a DeliveryLimits,
    pub(super) time: &'a Time,
    pub(super) mark: &'a ClusterMark,
}

/// An accepted message and its effects.
pub(super) struct Sent {
    pub(super) sent: GroupSent,
    /// The message to each recipient. Empty if an accepted commit is repeated.
    pub(super) messages: Vec<NewMessage>,
    pub(super) outcomes: Outcomes,
}

impl Statement for SendToGroup<'_> {
    type Output = Result<Sent, GroupRefusal>;

    /// A repeat is left to the caller, whose message id makes it safe.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "send_to_group"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let GroupMessage { group, sender, commit, now, .. } = self.message;
        let Some(locked) = lock(connection, group).await? else {
            return Ok(Err(GroupRefusal::NotFound));
        };
        if role_of(connection, group, *sender).await?.is_none() {
            // A ban removes the member.
            let at = self.time.bounds(*now, locked.postgres).earliest;
            let banned = bans::banned_from(connection, group, &[sender.0], at).await?;
            let is_banned = !banned.is_empty();
            return Ok(Err(if is_banned { GroupRefusal::Banned } else { GroupRefusal::NotMember }));
        }
        if let Some(commit) = commit {
            if let Some(sent) = self.first_result(connection, &locked).await? {
                let outcomes = Outcomes::default();
                return Ok(Ok(Sent { sent, messages: Vec::new(), outcomes }));
            }
            if commit.expected_epoch != locked.epoch {
                return Ok(Err(GroupRefusal::StaleEpoch(locked.epoch)));
            }
        }
        let messages = self.messages(connection).await?;
        let (limits, time, mark) = (self.limits, self.time, self.mark);
        let accepting = Accept { messages: &messages, limits, time, mark };
        let outcomes = accept(connection, &accepting).await?;
        let each = outcomes.of_each.iter().map(|outcome| outcome.enqueued).collect();
        let mut sent = GroupSent::new(self.message, locked.epoch, each);
        if let Some(commit) = commit {
            sent.epoch += 1;
            self.raise_epoch(connection, commit, sent.epoch).await?;
            self.remember(connection, &locked, &sent).await?;
        }
        Ok(Ok(Sent { sent, messages, outcomes }))
    }
}

impl SendToGroup<'_> {
    /// Returns the result of the accepted commit that this message repeats.
    async fn first_result(
        &self,
        connection: &mut PgConnection,
        locked: &Locked,
    ) -> sqlx::Result<Option<GroupSent>> {
        let GroupMessage { group, sender, message_id, now, .. } = self.message;
        let Some(message_id) = message_id else { return Ok(None) };
        let earliest = self.time.bounds(*now, locked.postgres).earliest;
        let row = sqlx::query(FIRST_RESULT)
            .bind(&group.as_bytes()[..])
            .bind(sender.0)
            .bind(&message_id.as_bytes()[..])
            .bind(millis(earliest).saturating_sub(millis_of(REMEMBERED)))
            .fetch_optional(connection)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let (outcome, epoch) = (row.bytes("outcome")?, row.unsigned("epoch")?);
        let first = GroupSent::decode(&outcome, self.message.channel(), epoch);
        Ok(Some(first.ok_or(NeverWritten("outcome"))?))
    }

    /// Returns the message to each recipient. All messages share the payload.
    async fn messages(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<NewMessage>> {
        let message = self.message;
        let to = |recipient: IdentityKey| NewMessage {
            sender: message.sender_key,
            recipient,
            channel: message.channel(),
            payload: message.payload.clone(),
            payload_sha256: message.payload_sha256,
            message_id: message.message_id,
            now: message.now,
            ttl: message.ttl,
        };
        let group = &message.group.as_bytes()[..];
        let query = match &message.recipients {
            GroupRecipients::Listed(listed) => return Ok(listed.iter().copied().map(to).collect()),
            GroupRecipients::All => sqlx::query(ALL).bind(group),
            GroupRecipients::Others => {
                let device = message.sender_device.as_ref().map(|device| &device.as_bytes()[..]);
                sqlx::query(OTHERS).bind(group).bind(message.sender.0).bind(device)
            }
        };
        let rows = query.fetch_all(connection).await?;
        rows.iter().map(|row| row.identity("identity").map(to)).collect()
    }

    async fn raise_epoch(
        &self,
        connection: &mut PgConnection,
        commit: &Commit,
        epoch: u64,
    ) -> sqlx::Result<()> {
        sqlx::query(RAISE_EPOCH)
            .bind(&self.message.group.as_bytes()[..])
            .bind(number(epoch))
            .bind(commit.group_info.as_deref())
            .execute(connection)
            .await
            .map(drop)
    }

    async fn remember(
        &self,
        connection: &mut PgConnection,
        locked: &Locked,
        sent: &GroupSent,
    ) -> sqlx::Result<()> {
        let GroupMessage { group, sender, message_id, now, .. } = self.message;
        let Some(message_id) = message_id else { return Ok(()) };
        let committed_at: UnixMillis = self.time.bounds(*now, locked.postgres).latest;
        sqlx::query(REMEMBER)
            .bind(&group.as_bytes()[..])
            .bind(sender.0)
            .bind(&message_id.as_bytes()[..])
            .bind(number(sent.epoch))
            .bind(millis(committed_at))
            .bind(sent.encode(self.message))
            .execute(connection)
            .await
            .map(drop)
    }
}
