//! Sends messages to groups, a few at a time and apart from the committers of single messages.
//!
//! A message to a group locks up to ten thousand inboxes. The senders are few, so most connections
//! are left to other calls. The senders admit calls by a budget of their own, so waiting messages
//! to groups do not delay the commits of single messages.

use qpq_domain::DeliveryLimits;
use qpq_ports::{
    GroupMessage, GroupRecipients, GroupRefusal, GroupSent, StoreError, StoreResult,
    admission::{Admission, AdmissionPermit},
    batcher::{self, BatchSize, BatchWorker, Batcher},
};
use sqlx::PgConnection;
use tracing::{Instrument as _, Span};

use super::send::{SendToGroup, Sent};
use crate::{
    effects::Applier,
    history::History,
    inboxes::Pushes,
    postgres::{ClusterMark, Database, OlderEdges, Repeat, Scope, Statement},
    time::Time,
};

/// Concurrent transactions. As with the committers, one waits for the disk while the other is
/// prepared.
const SENDERS: usize = 2;

/// Memory of a message for each recipient in addition to the payload, in bytes.
const RECIPIENT_BYTES: usize = 256;

/// Maximum bytes of a payload in the rows of all recipients together. A larger payload is stored
/// once: a copy in each row would keep the inboxes locked for seconds. 64 KiB for 10 000 members
/// take 8 s.
const IN_ROWS: usize = 64 << 20;

const COUNT: &str = "SELECT count(*) FROM group_member WHERE group_id = $1";

/// The error if a message is too large for the rows of its recipients and cannot be stored once.
#[derive(Debug, thiserror::Error)]
#[error(
    "a message of {bytes} bytes to {recipients} inboxes cannot be sent while an edge of an earlier \
     release is connected: replace that edge"
)]
struct OlderEdgesConnected {
    bytes: usize,
    recipients: usize,
}

/// The senders of messages to groups. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct GroupSenders {
    database: Database,
    mark: ClusterMark,
    senders: Batcher<Call>,
    admission: Admission,
}

type Call = batcher::Call<Waiting, StoreResult<Result<GroupSent, GroupRefusal>>>;

/// A message that waits for a sender.
#[derive(Debug)]
struct Waiting {
    message: GroupMessage,
    /// The span of the call, whose trace shows the transaction.
    span: Span,
    _permit: AdmissionPermit,
}

impl GroupSenders {
    /// Starts the senders. Needs a tokio runtime.
    pub(crate) fn start(
        database: &Database,
        history: &History,
        limits: DeliveryLimits,
        time: &Time,
        mark: &ClusterMark,
        applier: &Applier,
    ) -> Self {
        let start = |_| GroupSender {
            database: database.clone(),
            history: history.clone(),
            limits,
            time: time.clone(),
            mark: mark.clone(),
            pushes: Pushes::new(applier.clone()),
        };
        Self {
            database: database.clone(),
            mark: mark.clone(),
            senders: Batcher::start((0..SENDERS).map(start)),
            admission: Admission::default(),
        }
    }

    /// Accepts a message for its recipients durably.
    pub(super) async fn send(
        &self,
        message: GroupMessage,
    ) -> StoreResult<Result<GroupSent, GroupRefusal>> {
        let recipients = match &message.recipients {
            GroupRecipients::Listed(listed) => listed.len(),
            GroupRecipients::Others | GroupRecipients::All => {
                self.database.run(&CountMembers(&message)).await?
            }
        };
        let bytes = message.payload.len();
        if bytes.saturating_mul(recipients) > IN_ROWS {
            let marked = self.database.run(&MarkCluster(&self.mark)).await?;
            marked.map_err(|OlderEdges| {
                StoreError::unavailable(OlderEdgesConnected { bytes, recipients })
            })?;
        }
        let group_info = message.commit.as_ref().and_then(|commit| commit.group_info.as_ref());
        let bytes = bytes + group_info.map_or(0, |info| info.len()) + recipients * RECIPIENT_BYTES;
        let permit = self.admission.admit_from(&message.sender_key, recipients, bytes).await;
        let permit = permit.map_err(StoreError::unavailable)?;
        self.senders.call(Waiting { message, span: Span::current(), _permit: permit }).await
    }

    /// Sends the waiting messages, and ends.
    pub(crate) async fn close(&self) {
        self.senders.close().await;
    }
}

/// Counts the members of the message's group.
struct CountMembers<'a>(&'a GroupMessage);

impl Statement for CountMembers<'_> {
    type Output = usize;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "count_members"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<usize> {
        let count = sqlx::query_scalar(COUNT).bind(&self.0.group.as_bytes()[..]);
        let count: i64 = count.fetch_one(connection).await?;
        Ok(usize::try_from(count).unwrap_or_default())
    }
}

/// Marks the cluster unless it is marked. A separate transaction, because in the order of locks the
/// table `cluster` comes after the inboxes.
struct MarkCluster<'a>(&'a ClusterMark);

impl Statement for MarkCluster<'_> {
    type Output = Result<(), OlderEdges>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "mark_cluster"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        if self.0.is_set(connection).await? { Ok(Ok(())) } else { self.0.set(connection).await }
    }
}

struct GroupSender {
    database: Database,
    history: History,
    limits: DeliveryLimits,
    time: Time,
    mark: ClusterMark,
    pushes: Pushes,
}

impl BatchWorker for GroupSender {
    type Item = Call;

    /// Each message to a group is one transaction.
    const LIMIT: BatchSize = BatchSize { count: 1, bytes: usize::MAX };

    async fn run(&mut self, calls: Vec<Call>) {
        for Call { item: Waiting { message, span, _permit }, answer } in calls {
            let (limits, time, mark) = (&self.limits, &self.time, &self.mark);
            let send = SendToGroup { message: &message, limits, time, mark };
            match self.database.run(&send).instrument(span).await {
                Ok(Ok(Sent { sent, messages, outcomes })) => {
                    // Answered first, since the message is durable whether or not Redis can be
                    // updated.
                    answer.send(Ok(Ok(sent)));
                    if let Some(accepted) = outcomes.accepted(&messages) {
                        self.history.note(accepted.store_id);
                        self.pushes.push(accepted).await;
                    }
                }
                Ok(Err(refusal)) => answer.send(Ok(Err(refusal))),
                Err(error) => answer.send(Err(error.into())),
            }
        }
    }

    async fn end(self) {
        self.pushes.end().await;
    }
}
