//! A Postgres that goes back in time: to the state of a standby, or to a copy of its data.
//!
//! The server with the earlier state takes the address of the other server, so the clients of that
//! address reach it.

use std::{fs, path::Path, process::Stdio};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use crate::{
    postgres::{Postgres, RunAs, USER, run},
    process::{Home, POLL_INTERVAL, TIMEOUT},
};

/// A server that replicates another one. Dropping it stops it and removes its data.
#[derive(Debug)]
pub struct Standby(Postgres);

/// A copy of a server's data.
#[derive(Debug)]
pub struct Backup(Home);

/// A primary with an earlier state of another server, which can take the place of that server.
#[derive(Debug)]
pub struct Replacement(Postgres);

/// The way in which a copy is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restore {
    /// A point-in-time recovery: on another timeline.
    Recovered,
    /// A start like that of the original: on the same timeline.
    AsItIs,
}

impl Postgres {
    /// Starts an asynchronous standby with these settings and the state of this server.
    pub async fn standby(&self, settings: &[(&str, &str)]) -> anyhow::Result<Standby> {
        let Backup(home) = self.copy(&["--write-recovery-conf"]).await?;
        let standby = Self::launch_on(home, self.password().to_owned(), settings, None).await?;
        Ok(Standby(standby))
    }

    /// Copies the data while the server runs.
    pub async fn backup(&self) -> anyhow::Result<Backup> {
        self.copy(&[]).await
    }

    /// Promotes the standby on this server's address. This server must have ended.
    pub async fn fail_over_to(&self, standby: Standby) -> anyhow::Result<()> {
        let Standby(standby) = standby;
        standby.stop().await?;
        self.replace_data(&standby.path().join("data")).await?;
        self.sql("SELECT pg_promote(true, 60)").await?;
        self.is_primary().await
    }

    /// Stops the server and starts it with the data of a copy. The copy may be used again.
    pub async fn restore(&self, backup: &Backup, how: Restore) -> anyhow::Result<()> {
        let replacement = self.recover(backup, how).await?;
        self.stop().await?;
        self.replace_with(replacement).await
    }

    /// Starts a server with the data of a copy on its own address. The copy may be used again.
    pub async fn recover(&self, backup: &Backup, how: Restore) -> anyhow::Result<Replacement> {
        let (owner, home) = (RunAs::find()?, Home::new("postgres", Signal::SIGQUIT)?);
        owner.give_ownership(home.path())?;
        let data = home.path().join("data");
        let mut cp = std::process::Command::new("cp");
        cp.arg("-a").arg(backup.0.path().join("data")).arg(&data);
        tokio::task::spawn_blocking(move || run(cp)).await??;
        if how == Restore::Recovered {
            // Recovers to the end of the write-ahead log in the copy.
            let signal = data.join("recovery.signal");
            fs::write(&signal, "")?;
            owner.give_ownership(&signal)?;
            let settings = data.join("postgresql.auto.conf");
            let mut text = fs::read_to_string(&settings)?;
            text.push_str("restore_command = '/bin/false'\n");
            fs::write(&settings, text)?;
        }
        let replacement = Self::launch_on(home, self.password().to_owned(), &[], None).await?;
        replacement.is_primary().await?;
        Ok(Replacement(replacement))
    }

    /// Starts with the data of the replacement. This server must have ended.
    pub async fn replace_with(&self, replacement: Replacement) -> anyhow::Result<()> {
        let Replacement(replacement) = replacement;
        replacement.stop().await?;
        self.replace_data(&replacement.path().join("data")).await
    }

    async fn copy(&self, options: &[&str]) -> anyhow::Result<Backup> {
        let (owner, home) = (RunAs::find()?, Home::new("postgres", Signal::SIGQUIT)?);
        owner.give_ownership(home.path())?;
        let mut command = owner.command(&self.programs().join("pg_basebackup"));
        command
            .args(["-h", "127.0.0.1", "-U", USER, "-p", &self.port().to_string()])
            .args(["--checkpoint=fast", "--no-sync", "--wal-method=stream"])
            .args(options)
            .arg("-D")
            .arg(home.path().join("data"))
            .env("PGPASSWORD", self.password())
            .current_dir(home.path())
            .stdin(Stdio::null());
        tokio::task::spawn_blocking(move || run(command)).await?.context("a copy")?;
        Ok(Backup(home))
    }

    async fn replace_data(&self, with: &Path) -> anyhow::Result<()> {
        let data = self.path().join("data");
        fs::remove_dir_all(&data)?;
        fs::rename(with, &data)?;
        self.start_again().await
    }

    async fn is_primary(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while self.sql("SELECT pg_is_in_recovery()").await? == "t" {
            ensure!(Instant::now() < deadline, "Postgres is still in recovery");
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }
}

impl Standby {
    /// Waits until the standby has everything that the primary has now.
    pub async fn catches_up(&self, primary: &Postgres) -> anyhow::Result<()> {
        let position = primary.sql("SELECT pg_current_wal_lsn()").await?;
        let sql = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{position}', false)");
        let deadline = Instant::now() + TIMEOUT;
        while self.0.sql(&sql).await? != "t" {
            ensure!(Instant::now() < deadline, "the standby does not catch up");
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Makes every later commit of the primary wait for this standby, which must be the only one.
    ///
    /// Backends of the primary notice the setting at different times. So this waits until a commit
    /// is observed to wait for the standby.
    pub async fn becomes_synchronous(&self, primary: &Postgres) -> anyhow::Result<()> {
        const COMMIT: &str = "SELECT pg_logical_emit_message(true, 'qpq', '')";
        const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'").await?;
        primary.sql("SELECT pg_reload_conf()").await?;
        self.0.freeze();
        let deadline = Instant::now() + TIMEOUT;
        let waits = async {
            while primary.sql(WAITING).await? == "0" {
                ensure!(Instant::now() < deadline, "no commit waits for the standby");
                sleep(POLL_INTERVAL).await;
            }
            Ok(())
        };
        let commits = async {
            // Ends only if a commit fails, because a commit that waits for the standby waits until
            // the thaw.
            while Instant::now() < deadline {
                primary.sql(COMMIT).await?;
            }
            anyhow::bail!("commits do not wait for the standby")
        };
        let observed = tokio::select! { waited = waits => waited, failed = commits => failed };
        self.0.thaw();
        observed
    }

    /// Stops following the primary. The standby receives no later commits of the primary.
    pub async fn cut_off(&self) -> anyhow::Result<()> {
        self.0.sql("ALTER SYSTEM SET primary_conninfo = ''").await?;
        self.0.sql("SELECT pg_reload_conf()").await?;
        let deadline = Instant::now() + TIMEOUT;
        while self.0.sql("SELECT count(*) FROM pg_stat_wal_receiver").await? != "0" {
            ensure!(Instant::now() < deadline, "the standby still follows");
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Promotes the standby on an address of its own.
    pub async fn promote(self) -> anyhow::Result<Replacement> {
        self.0.sql("SELECT pg_promote(true, 60)").await?;
        self.0.is_primary().await?;
        Ok(Replacement(self.0))
    }
}

impl Replacement {
    /// Returns the URL of the replacement's own address.
    pub fn url(&self) -> String {
        self.0.url()
    }

    /// Returns the output of `psql` for `sql`, as [`Postgres::sql`].
    pub async fn sql(&self, sql: &str) -> anyhow::Result<String> {
        self.0.sql(sql).await
    }
}
