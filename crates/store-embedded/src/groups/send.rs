//! Messages to groups, and their commits.
//!
//! A message to a group is one statement: it checks the membership and the epoch, accepts the
//! message for each recipient, raises the epoch, and stores the GroupInfo. An accepted commit with
//! a message id is remembered with its result for [`REMEMBERED`], so that a repeat has that result
//! instead of a stale epoch.

use std::time::Duration;

use qpq_domain::{DeliveryLimits, UnixMillis};
use qpq_ports::{Commit, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, NewMessage};
use sqlx::SqliteConnection;

use super::Head;
use crate::{
    bans,
    clock::ClockGuard,
    error::NeverWritten,
    messages::{enqueue, remove::SWEEP_ROWS},
    row::{Columns as _, millis, number},
    statement::{Done, SMALL, Statement},
};

/// The time for which an accepted commit is remembered. No client that still waits for the answer
/// repeats the call after a longer time.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The bytes that a message to a group counts in the queue and in a transaction for each recipient:
/// about the size of its row and index entries.
const RECIPIENT_BYTES: usize = 1 << 10;

/// ?1 group, ?2 sender, ?3 message id, ?4 the instant after which a commit is remembered.
const FIRST_RESULT: &str = "
    SELECT epoch, outcome FROM group_commit
     WHERE group_id = ?1 AND account = ?2 AND message_id = ?3 AND committed_at > ?4";

/// The members, in the order of their inboxes, without deleted accounts, which have none.
const ALL: &str = "
    SELECT a.identity FROM group_member m CROSS JOIN account a ON a.id = m.account
     WHERE m.group_id = ?1 AND EXISTS (SELECT 1 FROM inbox i WHERE i.id = m.account)
     ORDER BY m.account";

/// The members, without the sender ?2 unless the sender has another device than ?3. See [`ALL`].
const OTHERS: &str = "
    SELECT a.identity FROM group_member m CROSS JOIN account a ON a.id = m.account
     WHERE m.group_id = ?1 AND EXISTS (SELECT 1 FROM inbox i WHERE i.id = m.account)
       AND (m.account <> ?2
            OR EXISTS (SELECT 1 FROM device d WHERE d.account = ?2 AND d.device IS NOT ?3))
     ORDER BY m.account";

const RAISE_EPOCH: &str = "UPDATE mls_group SET epoch = ?2 WHERE id = ?1";
const STORE_INFO: &str = "UPDATE mls_group SET epoch = ?2, group_info = ?3 WHERE id = ?1";

/// Stores a commit, in place of an expired one with the same id that no sweep has removed yet.
const REMEMBER: &str = "
    INSERT OR REPLACE INTO group_commit
        (group_id, account, message_id, epoch, committed_at, outcome)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6)";

const FORGET: &str = "
    DELETE FROM group_commit WHERE rowid IN (
        SELECT rowid FROM group_commit WHERE committed_at <= ?1 ORDER BY committed_at LIMIT +?2)";

#[cfg(test)]
pub(super) const STATEMENTS: [&str; 7] =
    [FIRST_RESULT, ALL, OTHERS, RAISE_EPOCH, STORE_INFO, REMEMBER, FORGET];

/// Accepts a message to a group. Returns the outcome.
pub(super) struct SendToGroup {
    pub(super) message: GroupMessage,
    /// The approximate number of recipients.
    pub(super) recipients: usize,
    pub(super) limits: DeliveryLimits,
    pub(super) clock: ClockGuard,
}

impl Statement for SendToGroup {
    type Answer = Result<GroupSent, GroupRefusal>;
    const NAME: &'static str = "send to group";

    fn bytes(&self) -> usize {
        let group_info = self.group_info().map_or(0, <[u8]>::len);
        SMALL + self.message.payload.len() + group_info + self.recipients * RECIPIENT_BYTES
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Self::Answer>> {
        let GroupMessage { group, sender, commit, now, .. } = &self.message;
        let head = match Head::of_member(tx, group, *sender).await? {
            Ok(head) => head,
            // A ban removes the member.
            Err(GroupRefusal::NotMember) => {
                let at = self.clock.bounds(*now).earliest;
                let is_banned = bans::is_banned_from(tx, group, *sender, at).await?;
                let refusal =
                    if is_banned { GroupRefusal::Banned } else { GroupRefusal::NotMember };
                return Ok(Done::keep(Err(refusal)));
            }
            Err(refusal) => return Ok(Done::keep(Err(refusal))),
        };
        if let Some(commit) = commit {
            if let Some(first) = self.first_result(tx).await? {
                return Ok(Done::keep(Ok(first)));
            }
            if commit.expected_epoch != head.epoch {
                return Ok(Done::keep(Err(GroupRefusal::StaleEpoch(head.epoch))));
            }
        }
        let messages = self.messages(tx).await?;
        let messages: Vec<_> = messages.iter().collect();
        let accepted = enqueue::all(tx, &messages, &self.limits, &self.clock).await?;
        let mut sent = GroupSent::new(&self.message, head.epoch, accepted.answer);
        if let Some(commit) = commit {
            sent.epoch += 1;
            self.raise_epoch(tx, commit, sent.epoch).await?;
            self.remember(tx, &sent).await?;
        }
        Ok(Done::with(Ok(sent), accepted.effects))
    }
}

impl SendToGroup {
    fn group_info(&self) -> Option<&[u8]> {
        self.message.commit.as_ref()?.group_info.as_deref()
    }

    /// Returns the result of the accepted commit that this one repeats.
    async fn first_result(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<GroupSent>> {
        let GroupMessage { group, sender, message_id, now, .. } = &self.message;
        let Some(message_id) = message_id else { return Ok(None) };
        let row = sqlx::query(FIRST_RESULT)
            .bind(&group.as_bytes()[..])
            .bind(sender.0)
            .bind(&message_id.as_bytes()[..])
            .bind(millis(self.clock.bounds(*now).earliest.minus(REMEMBERED)))
            .fetch_optional(tx)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let (outcome, epoch) = (row.bytes("outcome")?, row.unsigned("epoch")?);
        let first = GroupSent::decode(&outcome, self.message.channel(), epoch);
        Ok(Some(first.ok_or(NeverWritten("outcome"))?))
    }

    /// Returns the message to each recipient. All messages share the payload.
    async fn messages(&self, tx: &mut SqliteConnection) -> sqlx::Result<Vec<NewMessage>> {
        let message = &self.message;
        let to = |recipient| NewMessage {
            sender: message.sender_key,
            recipient,
            channel: message.channel(),
            payload: message.payload.clone(),
            payload_sha256: message.payload_sha256,
            message_id: message.message_id,
            now: message.now,
            ttl: message.ttl,
        };
        let sql = match &message.recipients {
            GroupRecipients::Listed(listed) => return Ok(listed.iter().copied().map(to).collect()),
            GroupRecipients::Others => OTHERS,
            GroupRecipients::All => ALL,
        };
        let rows = sqlx::query(sql)
            .bind(&message.group.as_bytes()[..])
            .bind(message.sender.0)
            .bind(message.sender_device.as_ref().map(|device| &device.as_bytes()[..]))
            .fetch_all(tx)
            .await?;
        rows.iter().map(|row| row.identity("identity").map(to)).collect()
    }

    async fn raise_epoch(
        &self,
        tx: &mut SqliteConnection,
        commit: &Commit,
        epoch: u64,
    ) -> sqlx::Result<()> {
        // The GroupInfo can be a MiB, so it is written only if it changes.
        let sql = if commit.group_info.is_some() { STORE_INFO } else { RAISE_EPOCH };
        sqlx::query(sql)
            .bind(&self.message.group.as_bytes()[..])
            .bind(number(epoch))
            .bind(commit.group_info.as_deref())
            .execute(tx)
            .await
            .map(drop)
    }

    async fn remember(&self, tx: &mut SqliteConnection, sent: &GroupSent) -> sqlx::Result<()> {
        let GroupMessage { group, sender, message_id, now, .. } = &self.message;
        let Some(message_id) = message_id else { return Ok(()) };
        sqlx::query(REMEMBER)
            .bind(&group.as_bytes()[..])
            .bind(sender.0)
            .bind(&message_id.as_bytes()[..])
            .bind(number(sent.epoch))
            .bind(millis(self.clock.bounds(*now).latest))
            .bind(sent.encode(&self.message))
            .execute(tx)
            .await
            .map(drop)
    }
}

/// Removes up to [`SWEEP_ROWS`] commits that are older than [`REMEMBERED`]. Returns their number.
pub(crate) struct SweepCommits {
    pub(crate) now: UnixMillis,
}

impl Statement for SweepCommits {
    type Answer = u64;
    const NAME: &'static str = "sweep commits";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let forgotten = sqlx::query(FORGET)
            .bind(millis(self.now.minus(REMEMBERED)))
            .bind(SWEEP_ROWS)
            .execute(tx)
            .await?;
        Ok(Done::keep(forgotten.rows_affected()))
    }
}
