//! A Postgres that goes back in time: to what a standby had, or to a copy of its data.
//!
//! What takes the place of a server's data is started by the same command on the same address, so
//! any client that uses the server finds another one there.

use std::{fs, path::Path, process::Stdio};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use crate::{
    postgres::{Postgres, RunAs, USER, run},
    process::{Home, POLL_INTERVAL, TIMEOUT},
};

/// A server that follows another one. Dropping it stops it and removes its data.
#[derive(Debug)]
pub struct Standby(Postgres);

/// A copy of a server's data.
#[derive(Debug)]
pub struct Backup(Home);

/// How a copy is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restore {
    /// As after a point-in-time recovery: on another timeline.
    Recovered,
    /// As if nothing had happened: on the same timeline.
    AsItIs,
}

impl Postgres {
    /// Starts an asynchronous standby with these settings, which has what this server has now.
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

    /// Goes on from a copy, which may be used again.
    pub async fn restore(&self, backup: &Backup, how: Restore) -> anyhow::Result<()> {
        self.stop().await?;
        let copy = backup.0.path().join("restored");
        let mut cp = std::process::Command::new("cp");
        cp.arg("-a").arg(backup.0.path().join("data")).arg(&copy);
        run(cp)?;
        if how == Restore::Recovered {
            // As far as the log in the copy goes.
            let signal = copy.join("recovery.signal");
            fs::write(&signal, "")?;
            RunAs::find()?.give_ownership(&signal)?;
            let settings = copy.join("postgresql.auto.conf");
            let mut text = fs::read_to_string(&settings)?;
            text.push_str("restore_command = '/bin/false'\n");
            fs::write(&settings, text)?;
        }
        self.replace_data(&copy).await?;
        self.is_primary().await
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
            ensure!(Instant::now() < deadline, "it is still recovering");
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }
}

impl Standby {
    /// Completes once the standby has all that the primary has now.
    pub async fn catches_up(&self, primary: &Postgres) -> anyhow::Result<()> {
        let position = primary.sql("SELECT pg_current_wal_lsn()").await?;
        let sql = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{position}', false)");
        let deadline = Instant::now() + TIMEOUT;
        while self.0.sql(&sql).await? != "t" {
            ensure!(Instant::now() < deadline, "it does not catch up");
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Has the standby follow no longer. What the primary commits from now on is not on it.
    pub async fn cut_off(&self) -> anyhow::Result<()> {
        self.0.sql("ALTER SYSTEM SET primary_conninfo = ''").await?;
        self.0.sql("SELECT pg_reload_conf()").await?;
        let deadline = Instant::now() + TIMEOUT;
        while self.0.sql("SELECT count(*) FROM pg_stat_wal_receiver").await? != "0" {
            ensure!(Instant::now() < deadline, "it still follows");
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }
}
