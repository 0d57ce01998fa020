//! `migrate`, with a real Postgres.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Stdio},
};

use qpq_test_services::Postgres;

use crate::harness::{Workspace, run_with, text};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_migration_changes_nothing() {
    let postgres = Postgres::start().await.unwrap();
    let url = postgres.url();
    let workspace = Workspace::new();
    // The configuration of an edge. The password file of Redis is not read.
    let (before, after) = url.split_once("://").unwrap();
    let (user, host) = after.split_once('@').unwrap();
    let (user, _) = user.split_once(':').unwrap();
    let (config, secret) = (workspace.path("qpq.toml"), workspace.path("password"));
    fs::write(&secret, format!("{}\n", postgres.password())).unwrap();
    let settings = format!(
        "[postgres]\nurl = \"{before}://{user}@{host}\"\npassword_file = \"{}\"\n\
         [redis]\nurl = \"redis://127.0.0.1:1\"\npassword_file = \"/not/here\"\n",
        text(&secret)
    );
    fs::write(&config, settings).unwrap();
    for _ in 0..2 {
        let end = run_with(&["migrate", "--config", text(&config)], &[]);
        assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
        let version = postgres.sql("SELECT max(version) FROM _sqlx_migrations").await.unwrap();
        assert_eq!(end.stdout, format!("the database's schema is at version {version}\n"));
    }
    assert_eq!(postgres.sql("SELECT count(*) FROM account").await.unwrap(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_is_not_running_yet_is_retried() {
    let postgres = Postgres::start().await.unwrap();
    postgres.stop().await.unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
        .arg("migrate")
        .env_clear()
        .env("QPQ_POSTGRES__URL", postgres.url())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(
        line.contains("Postgres cannot be reached") && line.contains("Retrying for up to"),
        "{line}"
    );
    postgres.start_again().await.unwrap();
    let mut stdout = String::new();
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(stdout.starts_with("the database's schema is at version"), "{stdout}");
}

#[test]
fn missing_settings_and_unreachable_servers_are_reported() {
    let end = run_with(&["migrate"], &[]);
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(end.stderr.contains("postgres.url must be given"), "{end:?}");
    let url = ("QPQ_POSTGRES__URL", "postgres://qpq:word@127.0.0.1:1/qpq");
    let end = run_with(&["migrate"], &[url, ("QPQ_CLUSTER__START_TIMEOUT", "100ms")]);
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.stderr.contains("see that it runs and that postgres.url is right"), "{end:?}");
    assert!(!end.stderr.contains("word"), "{end:?}");
    let end = run_with(&["migrate", "--config", "/not/here"], &[]);
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(end.stderr.contains("/not/here"), "{end:?}");
    let end = run_with(&["migrate-to-cluster", "--from", "data"], &[url]);
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(end.stderr.contains("cluster.secrets_dir must be given"), "{end:?}");
    assert_eq!(run_with(&["migrate-to-cluster"], &[url]).code, Some(2));
}
