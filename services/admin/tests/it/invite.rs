//! `invite`: invites are created, listed and revoked, on a single node and in a cluster.

use qpq_domain::{InviteCode, StoreLimits, Username};
use qpq_ports::{Admission, Clock as _, NewAccount, Registration, Stores, SystemClock};
use qpq_store_embedded::EmbeddedStore;
use qpq_test_services::Postgres;
use serde_json::Value;

use crate::harness::{RunOutput, Workspace, run, run_failing, run_with, text};

/// Registers an account with a code that the command has printed.
async fn register(stores: &Stores, name: &str, code: &str) -> Registration {
    let key = u8::try_from(name.len()).unwrap();
    let account = NewAccount {
        username: Username::parse(name).unwrap(),
        identity: qpq_domain::IdentityKey::new([key; 32]),
        opaque_record: vec![0; 192],
        admission: Admission::Invite(InviteCode::parse(code).unwrap().hash()),
        now: SystemClock.now(),
    };
    stores.accounts.register(account).await.unwrap()
}

fn objects(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn invites_of_a_running_and_of_a_stopped_single_node_are_created_listed_and_revoked() {
    for stopped in [false, true] {
        let workspace = Workspace::new();
        let dir = workspace.path("data");
        let open = || async { EmbeddedStore::open(&dir, StoreLimits::default()).await.unwrap() };
        let store = open().await;
        let store = if stopped {
            store.close().await;
            None
        } else {
            Some(store)
        };
        let place = ["--data-dir", text(&dir)];
        let invite = |arguments: &[&str]| run(&[&["invite"], arguments, &place].concat());
        assert_eq!(invite(&["list"]), "There are no invites.\n");
        let created = invite(&["create", "--uses", "2", "--expires", "30d", "--note", "for work"]);
        let code = created.lines().next().unwrap();
        assert_eq!(InviteCode::parse(code).unwrap().expose(), code);
        assert!(created.contains("registers 2 accounts within 30 days"), "{created}");
        assert!(created.contains("not shown again"), "{created}");
        let listed = invite(&["list"]);
        assert!(listed.contains("for work") && !listed.contains(code), "{listed}");

        let named = objects(&invite(&["create", "--username", "Root", "--json"])).remove(0);
        assert_eq!((&named["username"], &named["uses"]), (&"root".into(), &1.into()));
        let store = match store {
            Some(store) => store,
            None => open().await,
        };
        let registered = register(&store.stores(), "alice", code).await;
        assert!(matches!(registered, Registration::Registered(_)), "{registered:?}");
        let registered = register(&store.stores(), "root", named["code"].as_str().unwrap()).await;
        assert!(matches!(registered, Registration::Registered(_)), "{registered:?}");
        let store = if stopped {
            store.close().await;
            None
        } else {
            Some(store)
        };

        let all = objects(&invite(&["list", "--json"]));
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|one| one["code"].is_null()), "codes are shown once: {all:?}");
        let work = all.iter().find(|one| one["note"] == "for work").unwrap();
        assert_eq!((&work["uses_left"], &work["uses"]), (&1.into(), &2.into()));
        let lifetime = work["expires_at"].as_u64().unwrap() - work["created_at"].as_u64().unwrap();
        assert_eq!(lifetime, 30 * 86_400_000);
        assert_eq!(objects(&invite(&["list", "--json", "--limit", "1"])).len(), 1);

        let id = work["id"].as_str().unwrap();
        assert_eq!(
            invite(&["revoke", &format!(" {} ", code.to_lowercase())]),
            format!("Invite {id} is revoked.\n")
        );
        for removed in [id, code] {
            let arguments = [&["invite", "revoke", removed][..], &place].concat();
            let stderr = run_failing(1, &arguments);
            assert!(stderr.contains(&format!("there is no invite {id}")), "{stderr}");
        }
        let other = named["id"].as_str().unwrap();
        let revoked = objects(&invite(&["revoke", other, "--json"])).remove(0);
        assert_eq!((&revoked["id"], &revoked["revoked"]), (&other.into(), &true.into()));
        let store = match store {
            Some(store) => store,
            None => open().await,
        };
        assert_eq!(register(&store.stores(), "bob", code).await, Registration::InviteInvalid);
        store.close().await;
    }
}

#[test]
fn wrong_arguments_of_invites_are_refused() {
    let workspace = Workspace::new();
    let dir = workspace.path("data");
    let long = "x".repeat(257);
    for arguments in [
        &["create", "--uses", "0"][..],
        &["create", "--uses", "1000001"],
        &["create", "--expires", "0"],
        &["create", "--expires", "3651d"],
        &["create", "--expires", "soon"],
        &["create", "--username", "a@b"],
        &["create", "--username", "root", "--uses", "2"],
        &["create", "--note", &long],
        &["create", "--note", "two\nlines"],
        &["revoke", "nonsense"],
        &["revoke"],
    ] {
        run_failing(2, &[&["invite"], arguments, &["--data-dir", text(&dir)]].concat());
    }
    let stderr = run_failing(1, &["invite", "list", "--data-dir", text(&dir)]);
    assert!(stderr.contains("qpq.db"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn invites_of_a_cluster_are_created_listed_and_revoked() {
    let postgres = Postgres::start().await.unwrap();
    let url = postgres.url();
    let invite = |arguments: &[&str]| -> RunOutput {
        run_with(&[&["invite"], arguments].concat(), &[("QPQ_POSTGRES__URL", &url)])
    };
    let end = invite(&["list"]);
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.stderr.contains("qpq-admin migrate"), "{end:?}");
    assert_eq!(run_with(&["migrate"], &[("QPQ_POSTGRES__URL", &url)]).code, Some(0));

    let end = invite(&["create", "--uses", "3", "--expires", "12h", "--json"]);
    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
    let created = objects(&end.stdout).remove(0);
    let hash = InviteCode::parse(created["code"].as_str().unwrap()).unwrap().hash();
    let stored = postgres.sql("SELECT encode(code, 'hex') FROM invite").await.unwrap();
    assert_eq!(stored, hex::encode(hash.as_bytes()));
    let mut listed = objects(&invite(&["list", "--json"]).stdout).remove(0);
    listed["code"] = created["code"].clone();
    assert_eq!(listed, created);
    let end = invite(&["revoke", created["code"].as_str().unwrap()]);
    assert_eq!(end.stdout, format!("Invite {} is revoked.\n", hash.id()));
    let end = invite(&["revoke", &hash.id().to_string()]);
    assert_eq!((end.code, end.stdout.as_str()), (Some(1), ""), "{end:?}");
    assert_eq!(invite(&["list"]).stdout, "There are no invites.\n");
}
