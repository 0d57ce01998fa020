//! `migrate`: the schema in a real Postgres.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Stdio},
};

use qpq_test_services::Postgres;

use crate::harness::{Place, run_with, text};

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_is_brought_up_to_date_and_again_changes_nothing() {
    let postgres = Postgres::start().await.unwrap();
    let url = postgres.url();
    let place = Place::new();
    // The edges' own file, with the password in a file beside it; Redis' is not asked for.
    let (before, after) = url.split_once("://").unwrap();
    let (user, host) = after.split_once('@').unwrap();
    let (user, _) = user.split_once(':').unwrap();
    let (config, secret) = (place.path("qpq.toml"), place.path("password"));
    fs::write(&secret, format!("{}\n", postgres.password())).unwrap();
    let settings = format!(
        "[postgres]\nurl = \"{before}://{user}@{host}\"\npassword_file = \"{}\"\n\
         [redis]\nurl = \"redis://127.0.0.1:1\"\npassword_file = \"/not/here\"\n",
        text(&secret)
    );
    fs::write(&config, settings).unwrap();
    for _ in 0..2 {
        let end = run_with(&["migrate", "--config", text(&config)], &[]);
        assert_eq!((end.code, end.said.as_str()), (Some(0), ""), "{end:?}");
        let version = postgres.sql("SELECT max(version) FROM _sqlx_migrations").await.unwrap();
        assert_eq!(end.printed, format!("the database's schema is at version {version}\n"));
    }
    assert_eq!(postgres.sql("SELECT count(*) FROM account").await.unwrap(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_is_starting_is_waited_for() {
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
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(
        line.contains("Postgres cannot be reached") && line.contains("Waiting for it"),
        "{line}"
    );
    postgres.start_again().await.unwrap();
    let mut printed = String::new();
    child.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(printed.starts_with("the database's schema is at version"), "{printed}");
}

#[test]
fn what_cannot_be_is_said() {
    let end = run_with(&["migrate"], &[]);
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(end.said.contains("postgres.url must be given"), "{end:?}");
    let url = ("QPQ_POSTGRES__URL", "postgres://qpq:word@127.0.0.1:1/qpq");
    let end = run_with(&["migrate"], &[url, ("QPQ_CLUSTER__START_TIMEOUT", "100ms")]);
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.said.contains("see that it runs and that postgres.url is right"), "{end:?}");
    assert!(!end.said.contains("word"), "{end:?}");
    let end = run_with(&["migrate", "--config", "/not/here"], &[]);
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(end.said.contains("/not/here"), "{end:?}");
    let end = run_with(&["migrate-to-cluster", "--from", "data"], &[url]);
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(end.said.contains("cluster.secrets_dir must be given"), "{end:?}");
    assert_eq!(run_with(&["migrate-to-cluster"], &[url]).code, Some(2));
}
