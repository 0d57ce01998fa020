//! Backups of a cluster: of the shared directory, and of the database with the client programs of
//! Postgres.

use std::fs;

use qpq_test_services::Postgres;

use super::assert_damage_is_found;
use crate::{
    harness::{RunOutput, contents, mode, run, text},
    transfer::{
        content::Amount,
        scene::{Edge, Scene},
    },
};

const SMALL: Amount = Amount { people: 8, acts: 120, payload: 3_000 };

const COUNTS: &str = "SELECT (SELECT count(*) FROM account),
    (SELECT count(*) FROM message),
    (SELECT sum(last_seq) FROM inbox),
    (SELECT md5(string_agg(payload, ''::bytea ORDER BY inbox, seq)) FROM message),
    (SELECT md5(string_agg(concat_ws(' ', id, kind, encode(key, 'hex'), encode(payload, 'hex'),
        run_at, attempts, last_error), ',' ORDER BY id)) FROM job)";

fn refused(end: &RunOutput) -> &str {
    assert_eq!((end.code, end.stdout.as_str()), (Some(1), ""), "{end:?}");
    assert_eq!(end.stderr.lines().count(), 1, "{end:?}");
    &end.stderr
}

fn done(end: RunOutput) -> String {
    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
    end.stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_cluster_is_restored_to_an_empty_database() {
    let scene = Scene::new(SMALL).await;
    done(scene.transfer_node());
    let backup = scene.workspace.path("backup");
    let stdout = done(scene.run(&["backup", text(&backup)]));
    assert!(stdout.contains("backed up a cluster"), "{stdout}");
    assert_eq!(mode(&backup), 0o700);
    assert_eq!(mode(&backup.join("postgres.dump")), 0o600);
    assert_eq!(contents(&backup.join("shared")), contents(&scene.shared));
    let stdout = run(&["verify", text(&backup)]);
    assert!(stdout.contains("accounts   8"), "{stdout}");
    assert_damage_is_found(&backup, || crate::harness::run_failing(1, &["verify", text(&backup)]));

    // A database that is not empty is refused.
    let end = scene.run(&["restore", text(&backup)]);
    assert!(refused(&end).contains("is not empty"), "{end:?}");
    let id = scene.sql("SELECT salt FROM store").await;

    let fresh = Postgres::start().await.unwrap();
    let end = scene.run_on(&fresh.url(), &["restore", text(&backup)]);
    let stdout = done(end);
    assert!(stdout.contains("For users this means"), "{stdout}");
    assert_ne!(scene.sql("SELECT count(*) FROM job").await, "0");
    assert_eq!(fresh.sql(COUNTS).await.unwrap(), scene.sql(COUNTS).await);
    let packages = "SELECT count(*) FROM key_package WHERE NOT last_resort";
    assert_ne!(scene.sql(packages).await, "0");
    assert_eq!(fresh.sql(packages).await.unwrap(), "0");
    let salt = fresh.sql("SELECT salt FROM store").await.unwrap();
    assert_ne!(salt, id);

    // mark-restored begins another history.
    done(scene.run_on(&fresh.url(), &["mark-restored"]));
    assert_ne!(fresh.sql("SELECT salt FROM store").await.unwrap(), salt);
    assert_eq!(fresh.sql(COUNTS).await.unwrap(), scene.sql(COUNTS).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_of_a_dump_ends_all_sessions() {
    let scene = Scene::new(SMALL).await;
    done(scene.transfer_node());
    let sessions = scene.sql("SELECT count(*) FROM session").await;
    assert_ne!(sessions, "0");
    let backup = scene.workspace.path("backup");
    done(scene.run(&["backup", text(&backup)]));
    let fresh = Postgres::start().await.unwrap();
    let stdout = done(scene.run_on(&fresh.url(), &["restore", text(&backup)]));
    assert!(stdout.contains(&format!("sessions      {sessions} ended")), "{stdout}");
    assert!(stdout.contains("All sessions have ended"), "{stdout}");

    let servers = Edge::servers().await;
    let edge = servers.store_on(&fresh, &scene.shared).await;
    for token in scene.content.tokens() {
        assert_eq!(edge.stores().sessions.find(token).await.unwrap(), None);
    }
    edge.close().await;
    assert_eq!(scene.sql("SELECT count(*) FROM session").await, sessions, "those of the source");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_leaves_an_empty_database() {
    let scene = Scene::new(SMALL).await;
    done(scene.transfer_node());
    let backup = scene.workspace.path("backup");
    done(scene.run(&["backup", text(&backup)]));
    // The restore fails after the tables were created.
    let fresh = Postgres::start().await.unwrap();
    fresh
        .sql(
            "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'no indexes today'; END $$;
             CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION refuse()",
        )
        .await
        .unwrap();
    let end = scene.run_on(&fresh.url(), &["restore", text(&backup)]);
    assert!(refused(&end).contains("no indexes today"), "{end:?}");
    let tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(fresh.sql(tables).await.unwrap(), "0");
    fresh.sql("DROP EVENT TRIGGER refuse; DROP FUNCTION refuse()").await.unwrap();
    done(scene.run_on(&fresh.url(), &["restore", text(&backup)]));

    // The shared directory of another cluster is refused.
    let other = scene.workspace.path("other");
    run(&["init", "--out", text(&other)]);
    let url = fresh.create_database("another").await.unwrap();
    let end = crate::harness::run_with(
        &["restore", text(&backup)],
        &[("QPQ_POSTGRES__URL", &url), ("QPQ_CLUSTER__SECRETS_DIR", text(&other))],
    );
    assert!(refused(&end).contains("of another cluster"), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_error_names_a_missing_or_outdated_client_program_of_postgres() {
    let scene = Scene::new(SMALL).await;
    let backup = scene.workspace.path("backup");
    let tools = scene.workspace.path("tools");
    fs::create_dir(&tools).unwrap();
    let url = scene.postgres.url();
    let variables = [
        ("QPQ_POSTGRES__URL", url.as_str()),
        ("QPQ_CLUSTER__SECRETS_DIR", text(&scene.shared)),
        ("PATH", text(&tools)),
    ];
    let end = crate::harness::run_with(&["backup", text(&backup)], &variables);
    assert!(refused(&end).contains("pg_dump is not installed"), "{end:?}");
    assert!(refused(&end).contains("postgresql-client"), "{end:?}");
    let script = "#!/bin/sh\necho 'pg_dump: error: aborting because of server version mismatch' >&2\nexit 1\n";
    let old = tools.join("pg_dump");
    fs::write(&old, script).unwrap();
    fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let end = crate::harness::run_with(&["backup", text(&backup)], &variables);
    assert!(refused(&end).contains("pg_dump is older than the server"), "{end:?}");
    assert!(!backup.exists() && !scene.workspace.path("backup.unfinished").exists());
}
