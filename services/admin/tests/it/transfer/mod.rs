//! `migrate-to-cluster`: after a transfer the store of the cluster returns the same results as the
//! store of the node, and a transfer may be interrupted at any point.

pub(crate) mod content;
pub(crate) mod scene;

use std::{fs, io::Read as _, path::Path, process::Child, time::Duration};

use qpq_domain::StoreLimits;
use qpq_ports::transfer::Table;
use qpq_ports::{Batch, Enqueued, NewMessage, PageLimit, ReadQuery, Reader, View};
use qpq_store_embedded::{EmbeddedStore, OpenError, TRANSFERRED_FILE};
use rand::Rng as _;
use tokio::time::{Instant, sleep};

use crate::harness::{run, run_with, text};
use content::Amount;
use scene::{Edge, Scene, embedded};

const SMALL: Amount = Amount { people: 12, acts: 150, payload: 3_000 };
/// Large enough to be interrupted.
const LARGE: Amount = Amount { people: 40, acts: 300, payload: 3_000 };

#[tokio::test(flavor = "multi_thread")]
async fn a_transferred_node_has_the_same_contents_in_the_cluster() {
    let scene = Scene::new(SMALL).await;
    let copy = scene.copy(&scene.node, "copy");
    let digests = scene.digests().await;
    for table in Table::ALL {
        assert!(digests.of(table).rows > 0, "no rows to transfer in {table:?}");
    }
    // An edge is running and may have cached that these accounts do not exist.
    let servers = Edge::servers().await;
    let edge = servers.store(&scene).await;
    let cluster = edge.stores();
    for token in scene.content.tokens() {
        assert_eq!(cluster.sessions.find(token).await.unwrap(), None);
    }
    let (limit, now) = (PageLimit { messages: 10, bytes: 1_000 }, scene.content.now());
    for inbox in scene.content.identities() {
        let read = ReadQuery { reader: Reader::single(inbox), view: View::All };
        assert!(cluster.inboxes.lease(read, limit, now).await.unwrap().page().envelopes.is_empty());
    }
    let account = "INSERT INTO account (username, identity, opaque_record, created_at)";
    let values = "VALUES ('other', decode(repeat('ab', 32), 'hex'), '', 0)";
    scene.sql(&format!("{account} {values}")).await;

    let end = scene.transfer_node();
    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
    assert!(end.stdout.contains(&digests.to_string()), "{}\n{digests}", end.stdout);
    let node = embedded(&copy).await;
    scene.content.compare(&node.stores(), &cluster).await;
    node.close().await;
    edge.close().await;
    let left = "SELECT count(*) FROM pg_class WHERE relname LIKE 'import\\_%' AND relname NOT LIKE 'import\\_done%'";
    assert_eq!(scene.sql(left).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_transfer_continues_without_losing_or_doubling_rows() {
    const KILLS: usize = 10;
    let mut scene = Scene::new(LARGE).await;
    let copy = scene.copy(&scene.node, "copy");
    let digests = scene.digests().await;
    // The transfer is interrupted at random times within its duration without interruption.
    let begun = Instant::now();
    assert_eq!(scene.transfer_node().code, Some(0));
    let whole = begun.elapsed();
    start_over(&scene).await;

    let (mut kills, mut crashes, mut resumed) = (0, 0, 0);
    while kills < KILLS || crashes == 0 || resumed == 0 {
        let mut child = scene.start_transfer();
        sleep(whole.mul_f64(scene.random.gen_range(0.0..1.0))).await;
        if child.try_wait().unwrap().is_some() {
            assert_transferred(&scene, child, &digests.to_string()).await;
            start_over(&scene).await;
            continue;
        }
        if scene.random.gen_bool(0.3) {
            scene.postgres.kill9().await.unwrap();
            scene.postgres.start_again().await.unwrap();
            let (code, _, stderr) = end(child);
            assert!(code == Some(0) || stderr.contains("run this again"), "{code:?} {stderr}");
            crashes += 1;
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        }
        // Without the table `import_message`, either the transfer had not begun, or Postgres
        // completed it after the kill.
        let waiting = scene.postgres.sql("SELECT count(*) FROM import_message").await;
        if waiting.is_ok_and(|count| count != "0") {
            resumed += 1;
        }
    }
    eprintln!(
        "{kills} kills, {crashes} crashes of Postgres, {resumed} during the copy, {whole:?} without"
    );
    assert_transferred(&scene, scene.start_transfer(), &digests.to_string()).await;

    let servers = Edge::servers().await;
    let (edge, node) = (servers.store(&scene).await, embedded(&copy).await);
    scene.content.compare(&node.stores(), &edge.stores()).await;
    edge.close().await;
    node.close().await;
}

/// Waits for a transfer, which must succeed, and asserts that every row was transferred once.
async fn assert_transferred(scene: &Scene, child: Child, digests: &str) {
    let (code, stdout, stderr) = end(child);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains(digests) || stdout.contains("already"), "{stdout}");
    assert!(scene.is_marked());
    for table in [
        "account",
        "session",
        "inbox",
        "message",
        "recent_id",
        "key_package",
        "key_package_given",
        "hybrid_key",
    ] {
        let there = scene.sql(&format!("SELECT count(*) FROM {table}")).await;
        let expected =
            digests.lines().find(|line| line.split_whitespace().next() == Some(table)).unwrap();
        assert_eq!(Some(there.as_str()), expected.split_whitespace().nth(1), "{table}");
    }
}

/// Resets the cluster and the node to their state before a transfer.
async fn start_over(scene: &Scene) {
    scene.sql("DROP SCHEMA public CASCADE").await;
    scene.sql("CREATE SCHEMA public").await;
    scene.migrate();
    let _absent = fs::remove_file(scene.node.join(TRANSFERRED_FILE));
}

fn end(mut child: Child) -> (Option<i32>, String, String) {
    let (mut stdout, mut stderr) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    (child.wait().unwrap().code(), stdout, stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transferred_node_cannot_be_opened_or_transferred_elsewhere() {
    let scene = Scene::new(SMALL).await;
    let unmarked = scene.copy(&scene.node, "unmarked");
    let first = scene.transfer_node();
    assert_eq!(first.code, Some(0), "{first:?}");
    let refused = EmbeddedStore::open(&scene.node, StoreLimits::default()).await.unwrap_err();
    assert!(matches!(refused, OpenError::Transferred(_)), "{refused}");
    assert!(refused.to_string().contains(text(&scene.node.join(TRANSFERRED_FILE))), "{refused}");
    // Another transfer changes nothing, even after the cluster has changed.
    scene.sql("UPDATE inbox SET last_seq = last_seq + 1").await;
    let again = scene.transfer_node();
    assert_eq!((again.code, again.stderr.as_str()), (Some(0), ""), "{again:?}");
    assert!(again.stdout.contains("already"), "{again:?}");
    // The transfer was interrupted just before the mark.
    fs::remove_file(scene.node.join(TRANSFERRED_FILE)).unwrap();
    assert_eq!(scene.transfer_node().stdout, first.stdout);
    assert!(scene.is_marked());
    // A transfer to another cluster is refused.
    let elsewhere = scene.workspace.path("elsewhere");
    run(&["init", "--out", text(&elsewhere), "--from", text(&unmarked)]);
    let url = scene.postgres.url();
    let variables =
        [("QPQ_POSTGRES__URL", url.as_str()), ("QPQ_CLUSTER__SECRETS_DIR", text(&elsewhere))];
    let end = run_with(&["migrate-to-cluster", "--from", text(&scene.node)], &variables);
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.stderr.contains("moved into another cluster"), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_changed_after_an_interruption_is_transferred_with_the_changes() {
    let scene = Scene::new(SMALL).await;
    // The transfer fails in the last step, after all rows were copied.
    add_fault_trigger(&scene, "account", "RAISE EXCEPTION 'not now'").await;
    let end = scene.transfer_node();
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.stderr.contains("not now") && end.stderr.contains("run this again"), "{end:?}");
    assert!(!scene.is_marked());
    assert_eq!(scene.sql("SELECT count(*) FROM account").await, "0");
    assert_ne!(scene.sql("SELECT count(*) FROM import_message").await, "0");
    let store = embedded(&scene.node).await;
    let inbox = scene.content.identities().next().unwrap();
    let message = NewMessage {
        sender: inbox,
        recipient: inbox,
        channel: qpq_domain::ChannelId::DEFAULT,
        payload: "late".into(),
        payload_sha256: [1; 32],
        message_id: None,
        now: scene.content.now(),
        ttl: Duration::from_secs(1_000),
    };
    let sent = store.stores().inboxes.enqueue(Batch::new(vec![message])).await.unwrap();
    assert!(matches!(sent[..], [Enqueued::Accepted(_)]));
    store.close().await;
    scene.sql("DROP TRIGGER fault ON account").await;
    let digests = scene.digests().await;
    assert_transferred(&scene, scene.start_transfer(), &digests.to_string()).await;
    assert_eq!(scene.sql("SELECT count(*) FROM message WHERE payload = 'late'").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_differ_after_the_copy_fail_the_transfer() {
    let scene = Scene::new(SMALL).await;
    let digests = scene.digests().await.to_string();
    let faults = [
        ("message", "IF random() < 0.01 OR NEW.seq = 1 THEN NEW.payload = 'x'; END IF; RETURN NEW"),
        (
            "session",
            "IF NEW.token = (SELECT token FROM import_session ORDER BY 1 LIMIT 1) THEN RETURN NULL; END IF; RETURN NEW",
        ),
        ("key_package", "NEW.id = 1000000 - NEW.id; RETURN NEW"),
        ("inbox", "NEW.last_seq = NEW.last_seq + 1; RETURN NEW"),
    ];
    for (table, fault) in faults {
        add_fault_trigger(&scene, table, fault).await;
        let end = scene.transfer_node();
        assert_eq!((end.code, end.stdout.as_str()), (Some(1), ""), "{table}: {end:?}");
        assert!(
            end.stderr.contains(&format!("differ from those that were sent ({table})")),
            "{end:?}"
        );
        assert!(!scene.is_marked());
        assert_eq!(scene.sql("SELECT count(*) FROM account").await, "0");
        scene.sql(&format!("DROP TRIGGER fault ON {table}")).await;
    }
    assert_transferred(&scene, scene.start_transfer(), &digests).await;
}

/// Adds a trigger that runs `what` before each insert into `table`.
async fn add_fault_trigger(scene: &Scene, table: &str, what: &str) {
    let function = format!(
        "CREATE OR REPLACE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {what}; END $$"
    );
    scene.sql(&function).await;
    let trigger = "CREATE TRIGGER fault BEFORE INSERT ON";
    scene.sql(&format!("{trigger} {table} FOR EACH ROW EXECUTE FUNCTION fault()")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_fit_the_cluster_is_refused_before_any_write() {
    let mut scene = Scene::new(SMALL).await;
    let store = embedded(&scene.node).await;
    assert!(scene.failing_transfer().await.contains("in use by another server"));
    store.close().await;

    let account = "INSERT INTO account (username, identity, opaque_record, created_at)";
    let name = scene.content.names().nth(3).unwrap().to_owned();
    scene
        .sql(&format!("{account} VALUES ('{name}', decode(repeat('ab', 32), 'hex'), '', 0)"))
        .await;
    let stderr = scene.failing_transfer().await;
    assert!(stderr.contains(&format!("same name or identity key: {name}.")), "{stderr}");
    scene.sql("DELETE FROM account").await;
    let identity = scene.content.identities().nth(5).unwrap();
    let hex: String = identity.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    scene.sql(&format!("{account} VALUES ('else', decode('{hex}', 'hex'), '', 0)")).await;
    let name = scene.content.names().nth(5).unwrap().to_owned();
    let stderr = scene.failing_transfer().await;
    assert!(stderr.contains(&format!("same name or identity key: {name}.")), "{stderr}");
    scene.sql("DELETE FROM account").await;

    scene.sql("INSERT INTO cluster (opaque_setup) VALUES (decode(repeat('00', 32), 'hex'))").await;
    assert!(scene.failing_transfer().await.contains("OPAQUE setup is not the cluster's"));
    scene.sql("DELETE FROM cluster").await;

    let right = scene.shared.clone();
    let stranger = scene.workspace.path("stranger");
    run(&["init", "--out", text(&stranger)]);
    scene.shared = stranger.clone();
    let stderr = scene.failing_transfer().await;
    assert!(
        stderr.contains("opaque-setup.bin differs from") && stderr.contains("init --out"),
        "{stderr}"
    );
    fs::copy(right.join("opaque-setup.bin"), stranger.join("opaque-setup.bin")).unwrap();
    assert!(scene.failing_transfer().await.contains("delivery-key.bin differs from"));
    scene.shared = right;

    scene.sql("DROP SCHEMA public CASCADE").await;
    scene.sql("CREATE SCHEMA public").await;
    assert!(scene.failing_transfer().await.contains("run `qpq-admin migrate`"));
    scene.migrate();
    let node = std::mem::replace(&mut scene.node, scene.workspace.path("nowhere"));
    assert!(scene.failing_transfer().await.contains("no server data"));
    assert!(!Path::exists(&scene.node));
    scene.node = node;
    assert_eq!(scene.transfer_node().code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_concurrent_transfers_transfer_a_node_once() {
    let scene = Scene::new(SMALL).await;
    let digests = scene.digests().await.to_string();
    let children = [scene.start_transfer(), scene.start_transfer()];
    let ends = children.map(end);
    // The second run finds the directory in use, or the transfer complete.
    assert!(ends.iter().any(|(code, _, _)| *code == Some(0)), "{ends:?}");
    for (code, _, stderr) in &ends {
        assert!(*code == Some(0) || stderr.contains("in use"), "{ends:?}");
    }
    assert_transferred(&scene, scene.start_transfer(), &digests).await;
}
