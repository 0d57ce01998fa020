//! Changes of the store's history under traffic: a standby is promoted, a backup is restored. Redis
//! and the edges keep running.
//!
//! Each change is recorded for the checker of [`qpq_test_services::history`], with the seqs that
//! the new history begins with. These seqs are read from the new primary before an edge reaches it.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use qpq_domain::{Seq, StoreId};
use qpq_test_services::{
    Replacement, Restore,
    history::{Kept, Moment, StoreChange},
};

use crate::{cluster::Cluster, traffic::Traffic};

/// A way in which the store goes back in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The primary is killed, and its synchronous standby is promoted on its address.
    FailOver,
    /// The primary is killed, and an asynchronous standby that lags takes its place.
    FailOverToLagging,
    /// A point-in-time recovery, and then `qpq-admin mark-restored` while edges run.
    Recover,
    /// A failover, and then a copy of the data from before it: marked by `qpq-admin mark-restored`
    /// and started on the timeline of the original.
    RestoreCopy,
}

/// Selects the newest seq of each account.
const LAST_SEQS: &str =
    "SELECT encode(a.identity, 'hex'), i.last_seq FROM account a JOIN inbox i ON i.id = a.id";

/// The current history of the store of a cluster with traffic.
#[derive(Debug)]
pub struct StoreHistory {
    store: StoreId,
}

impl StoreHistory {
    pub async fn of(cluster: &Cluster) -> anyhow::Result<Self> {
        Ok(Self { store: cluster.store_id_other_than(None).await? })
    }

    /// Changes the history. Returns when every edge reports the new store id. A change that loses
    /// messages loses at least `lag` acknowledged messages, if the traffic has not ended before.
    pub async fn change(
        &mut self,
        change: Change,
        cluster: &Cluster,
        traffic: &Traffic,
        lag: u64,
    ) -> anyhow::Result<()> {
        let changing = Changing { cluster, traffic, lag };
        let done = match change {
            Change::FailOver => self.fail_over(&changing).await,
            Change::FailOverToLagging => self.fail_over_to_lagging(&changing).await,
            Change::Recover => self.recover(&changing).await,
            Change::RestoreCopy => self.restore_copy(&changing).await,
        };
        done.with_context(|| format!("{change:?}"))
    }

    async fn fail_over(&mut self, changing: &Changing<'_>) -> anyhow::Result<()> {
        let postgres = &changing.cluster.postgres;
        let standby = postgres.standby(&[]).await?;
        standby.catches_up(postgres).await?;
        standby.becomes_synchronous(postgres).await?;
        changing.traffic.acknowledged_more(changing.lag).await;
        postgres.kill9().await?;
        let at = changing.now();
        postgres.fail_over_to(standby).await?;
        self.changed(changing, self.store, Kept::Everything, (at, at)).await
    }

    async fn fail_over_to_lagging(&mut self, changing: &Changing<'_>) -> anyhow::Result<()> {
        let postgres = &changing.cluster.postgres;
        let standby = postgres.standby(&[]).await?;
        standby.catches_up(postgres).await?;
        standby.cut_off().await?;
        changing.traffic.acknowledged_more(changing.lag).await;
        postgres.kill9().await?;
        let at = changing.now();
        let primary = standby.promote().await?;
        let kept = changing.kept_by(&primary).await?;
        postgres.replace_with(primary).await?;
        self.changed(changing, self.store, kept, (at, at)).await
    }

    async fn recover(&mut self, changing: &Changing<'_>) -> anyhow::Result<()> {
        let postgres = &changing.cluster.postgres;
        let backup = postgres.backup().await?;
        changing.traffic.acknowledged_more(changing.lag).await;
        let primary = postgres.recover(&backup, Restore::Recovered).await?;
        let kept = changing.kept_by(&primary).await?;
        postgres.stop().await?;
        let at = changing.now();
        postgres.replace_with(primary).await?;
        self.changed(changing, self.store, kept, (at, at)).await?;

        let from = changing.now();
        changing.cluster.mark_restored(&postgres.url()).await?;
        let until = changing.now();
        self.changed(changing, self.store, Kept::Everything, (from, until)).await
    }

    async fn restore_copy(&mut self, changing: &Changing<'_>) -> anyhow::Result<()> {
        let postgres = &changing.cluster.postgres;
        let (backup, continues) = (postgres.backup().await?, self.store);
        self.fail_over(changing).await?;
        let primary = postgres.recover(&backup, Restore::AsItIs).await?;
        changing.cluster.mark_restored(&primary.url()).await?;
        let kept = changing.kept_by(&primary).await?;
        postgres.stop().await?;
        let at = changing.now();
        postgres.replace_with(primary).await?;
        self.changed(changing, continues, kept, (at, at)).await
    }

    /// Records the change when every edge reports the new store id.
    async fn changed(
        &mut self,
        changing: &Changing<'_>,
        continues: StoreId,
        kept: Kept,
        (from, until): (Moment, Moment),
    ) -> anyhow::Result<()> {
        self.store = changing.cluster.store_id_other_than(Some(self.store)).await?;
        let change = StoreChange { continues, store: self.store, kept, from, until };
        changing.traffic.history().store_changed(change);
        Ok(())
    }
}

struct Changing<'a> {
    cluster: &'a Cluster,
    traffic: &'a Traffic,
    lag: u64,
}

impl Changing<'_> {
    fn now(&self) -> Moment {
        self.traffic.history().now()
    }

    /// Returns the seqs up to which a primary has the messages of the traffic's inboxes.
    async fn kept_by(&self, primary: &Replacement) -> anyhow::Result<Kept> {
        let rows = primary.sql(LAST_SEQS).await?;
        let (mut seqs, mut found) = (BTreeMap::new(), 0);
        for row in rows.lines() {
            let (identity, seq) = row.split_once('|').context("two columns")?;
            let streams = self.traffic.streams_of(&hex::decode(identity)?);
            found += usize::from(!streams.is_empty());
            for stream in streams {
                seqs.insert(stream, Seq(seq.parse()?));
            }
        }
        ensure!(found == self.traffic.inboxes(), "an account is missing: {seqs:?}");
        Ok(Kept::UpTo(seqs))
    }
}
