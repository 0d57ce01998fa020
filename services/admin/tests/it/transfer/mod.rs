//! `migrate-to-cluster`: whatever a node's store answers, the cluster's answers after the move, and
//! the move may be interrupted anywhere.

pub(crate) mod content;
pub(crate) mod scene;

use std::{fs, io::Read as _, path::Path, process::Child, time::Duration};

use qpq_ports::transfer::Table;
use qpq_ports::{Batch, Enqueued, NewMessage, PageLimit, ReadQuery, Reader, View};
use qpq_store_embedded::{EmbeddedStore, Limits, MOVED_FILE, OpenError};
use rand::Rng as _;
use tokio::time::{Instant, sleep};

use crate::harness::{run, run_with, text};
use content::Amount;
use scene::{Edge, Scene, embedded};

const SMALL: Amount = Amount { people: 12, acts: 150, payload: 3_000 };
/// Enough to be interrupted in.
const LARGE: Amount = Amount { people: 40, acts: 300, payload: 3_000 };

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_node_answers_the_cluster_answers() {
    let scene = Scene::new(SMALL).await;
    let copy = scene.copy(&scene.node, "copy");
    let digests = scene.digests().await;
    for table in Table::ALL {
        assert!(digests.of(table).rows > 0, "nothing to move in {table:?}");
    }
    // An edge is at work already, knows nobody, and may remember that.
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
    scene.sql("INSERT INTO account (username, identity, opaque_record, created_at) VALUES ('other', decode(repeat('ab', 32), 'hex'), '', 0)").await;

    let end = scene.move_node();
    assert_eq!((end.code, end.said.as_str()), (Some(0), ""), "{end:?}");
    assert!(end.printed.contains(&digests.to_string()), "{}\n{digests}", end.printed);
    let node = embedded(&copy).await;
    scene.content.compare(&node.stores(), &cluster).await;
    node.close().await;
    edge.close().await;
    let left = "SELECT count(*) FROM pg_class WHERE relname LIKE 'import\\_%' AND relname NOT LIKE 'import\\_done%'";
    assert_eq!(scene.sql(left).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_anywhere_it_goes_on_and_nothing_is_lost_or_doubled() {
    const KILLS: usize = 10;
    let mut scene = Scene::new(LARGE).await;
    let copy = scene.copy(&scene.node, "copy");
    let digests = scene.digests().await;
    // How long it takes undisturbed says when to strike.
    let begun = Instant::now();
    assert_eq!(scene.move_node().code, Some(0));
    let whole = begun.elapsed();
    start_over(&scene).await;

    let (mut kills, mut crashes, mut resumed) = (0, 0, 0);
    while kills < KILLS || crashes == 0 || resumed == 0 {
        let mut child = scene.start_moving();
        sleep(whole.mul_f64(scene.random.gen_range(0.0..1.0))).await;
        if child.try_wait().unwrap().is_some() {
            assert_moved(&scene, child, &digests.to_string()).await;
            start_over(&scene).await;
            continue;
        }
        if scene.random.gen_bool(0.3) {
            scene.postgres.kill9().await.unwrap();
            scene.postgres.start_again().await.unwrap();
            let (code, _, said) = end(child);
            assert!(code == Some(0) || said.contains("run this again"), "{code:?} {said}");
            crashes += 1;
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        }
        // No such table: nothing had begun, or what the killed process had asked for last was the
        // end, and Postgres did it.
        let waiting = scene.postgres.sql("SELECT count(*) FROM import_message").await;
        if waiting.is_ok_and(|count| count != "0") {
            resumed += 1;
        }
    }
    eprintln!(
        "{kills} kills, {crashes} crashes of Postgres, {resumed} times in the midst of it, {whole:?} undisturbed"
    );
    assert_moved(&scene, scene.start_moving(), &digests.to_string()).await;

    let servers = Edge::servers().await;
    let (edge, node) = (servers.store(&scene).await, embedded(&copy).await);
    scene.content.compare(&node.stores(), &edge.stores()).await;
    edge.close().await;
    node.close().await;
}

/// Lets it come to its end, which must be good, and looks that everything is there once.
async fn assert_moved(scene: &Scene, child: Child, digests: &str) {
    let (code, printed, said) = end(child);
    assert_eq!(code, Some(0), "{said}");
    assert!(printed.contains(digests) || printed.contains("already"), "{printed}");
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

/// As if nothing had been moved yet.
async fn start_over(scene: &Scene) {
    scene.sql("DROP SCHEMA public CASCADE").await;
    scene.sql("CREATE SCHEMA public").await;
    scene.migrate();
    let _absent = fs::remove_file(scene.node.join(MOVED_FILE));
}

fn end(mut child: Child) -> (Option<i32>, String, String) {
    let (mut printed, mut said) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), printed, said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_moved_stays_moved() {
    let scene = Scene::new(SMALL).await;
    let unmarked = scene.copy(&scene.node, "unmarked");
    let first = scene.move_node();
    assert_eq!(first.code, Some(0), "{first:?}");
    let refused = EmbeddedStore::open(&scene.node, Limits::default()).await.unwrap_err();
    assert!(matches!(refused, OpenError::Moved(_)), "{refused}");
    assert!(refused.to_string().contains(text(&scene.node.join(MOVED_FILE))), "{refused}");
    // Once more changes nothing, also after the cluster went on by itself.
    scene.sql("UPDATE inbox SET last_seq = last_seq + 1").await;
    let again = scene.move_node();
    assert_eq!((again.code, again.said.as_str()), (Some(0), ""), "{again:?}");
    assert!(again.printed.contains("already"), "{again:?}");
    // Stopped just before it was marked.
    fs::remove_file(scene.node.join(MOVED_FILE)).unwrap();
    assert_eq!(scene.move_node().printed, first.printed);
    assert!(scene.is_marked());
    // Another cluster does not get it besides.
    let elsewhere = scene.place.path("elsewhere");
    run(&["init", "--out", text(&elsewhere), "--from", text(&unmarked)]);
    let url = scene.postgres.url();
    let variables =
        [("QPQ_POSTGRES__URL", url.as_str()), ("QPQ_CLUSTER__SECRETS_DIR", text(&elsewhere))];
    let end = run_with(&["migrate-to-cluster", "--from", text(&scene.node)], &variables);
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.said.contains("moved into another cluster"), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_changed_since_it_was_interrupted_is_moved_as_it_is_now() {
    let scene = Scene::new(SMALL).await;
    // Stops at the last step, with everything laid out.
    stumble(&scene, "account", "RAISE EXCEPTION 'not now'").await;
    let end = scene.move_node();
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.said.contains("not now") && end.said.contains("run this again"), "{end:?}");
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
    scene.sql("DROP TRIGGER stumble ON account").await;
    let digests = scene.digests().await;
    assert_moved(&scene, scene.start_moving(), &digests.to_string()).await;
    assert_eq!(scene.sql("SELECT count(*) FROM message WHERE payload = 'late'").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_otherwise_than_it_was_sent_is_not_kept() {
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
        stumble(&scene, table, fault).await;
        let end = scene.move_node();
        assert_eq!((end.code, end.printed.as_str()), (Some(1), ""), "{table}: {end:?}");
        assert!(
            end.said.contains(&format!("what arrived is not what was sent ({table})")),
            "{end:?}"
        );
        assert!(!scene.is_marked());
        assert_eq!(scene.sql("SELECT count(*) FROM account").await, "0");
        scene.sql(&format!("DROP TRIGGER stumble ON {table}")).await;
    }
    assert_moved(&scene, scene.start_moving(), &digests).await;
}

/// Does something else than is asked for whenever a row is inserted.
async fn stumble(scene: &Scene, table: &str, what: &str) {
    let function = format!(
        "CREATE OR REPLACE FUNCTION stumble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {what}; END $$"
    );
    scene.sql(&function).await;
    let trigger = "CREATE TRIGGER stumble BEFORE INSERT ON";
    scene.sql(&format!("{trigger} {table} FOR EACH ROW EXECUTE FUNCTION stumble()")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_be_moved_is_refused_before_anything_is_written() {
    let mut scene = Scene::new(SMALL).await;
    let store = embedded(&scene.node).await;
    assert!(scene.refused().await.contains("in use by another server"));
    store.close().await;

    let account = "INSERT INTO account (username, identity, opaque_record, created_at)";
    let name = scene.content.names().nth(3).unwrap().to_owned();
    scene
        .sql(&format!("{account} VALUES ('{name}', decode(repeat('ab', 32), 'hex'), '', 0)"))
        .await;
    let said = scene.refused().await;
    assert!(said.contains(&format!("same name or identity: {name}.")), "{said}");
    scene.sql("DELETE FROM account").await;
    let identity = scene.content.identities().nth(5).unwrap();
    let hex: String = identity.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    scene.sql(&format!("{account} VALUES ('else', decode('{hex}', 'hex'), '', 0)")).await;
    let name = scene.content.names().nth(5).unwrap().to_owned();
    let said = scene.refused().await;
    assert!(said.contains(&format!("same name or identity: {name}.")), "{said}");
    scene.sql("DELETE FROM account").await;

    scene.sql("INSERT INTO cluster (opaque_setup) VALUES (decode(repeat('00', 32), 'hex'))").await;
    assert!(scene.refused().await.contains("OPAQUE setup is not the cluster's"));
    scene.sql("DELETE FROM cluster").await;

    let right = scene.fleet.clone();
    let stranger = scene.place.path("stranger");
    run(&["init", "--out", text(&stranger)]);
    scene.fleet = stranger.clone();
    let said = scene.refused().await;
    assert!(
        said.contains("opaque-setup.bin is another than") && said.contains("init --out"),
        "{said}"
    );
    fs::copy(right.join("opaque-setup.bin"), stranger.join("opaque-setup.bin")).unwrap();
    assert!(scene.refused().await.contains("delivery-key.bin is another than"));
    scene.fleet = right;

    scene.sql("DROP SCHEMA public CASCADE").await;
    scene.sql("CREATE SCHEMA public").await;
    assert!(scene.refused().await.contains("run `qpq-admin migrate`"));
    scene.migrate();
    let node = std::mem::replace(&mut scene.node, scene.place.path("nowhere"));
    assert!(scene.refused().await.contains("no server's data"));
    assert!(!Path::exists(&scene.node));
    scene.node = node;
    assert_eq!(scene.move_node().code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_at_a_time_move_it_once() {
    let scene = Scene::new(SMALL).await;
    let digests = scene.digests().await.to_string();
    let children = [scene.start_moving(), scene.start_moving()];
    let ends = children.map(end);
    // The second finds the directory taken, or all done.
    assert!(ends.iter().any(|(code, _, _)| *code == Some(0)), "{ends:?}");
    for (code, _, said) in &ends {
        assert!(*code == Some(0) || said.contains("in use"), "{ends:?}");
    }
    assert_moved(&scene, scene.start_moving(), &digests).await;
}
