//! Invites over several edges: registrations at different edges with one invite.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use qpq_domain::{InviteHash, StoreLimits};
use qpq_ports::{Admission, NewAccount, NewInvite, Registration};
use tokio::task::JoinSet;

use crate::{
    backend::{Servers, edge},
    people::{NOW, new_account},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_registrations_at_three_edges_with_an_invite_for_three_exactly_three_succeed() {
    const USES: usize = 3;
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let edges = join_all((0..3).map(|_| edge(&config))).await;
    let stores: Vec<_> = edges.iter().map(qpq_store_cluster::ClusterStore::stores).collect();
    let code = InviteHash::new([1; 32]);
    let invite = NewInvite {
        code,
        uses: u32::try_from(USES).expect("small"),
        lifetime: Duration::from_secs(60),
        username: None,
        note: String::new(),
        now: NOW,
    };
    stores[0].invites.create(invite).await.expect("create");
    let mut attempts = JoinSet::new();
    for n in 0..64_u8 {
        let accounts = stores[usize::from(n) % 3].accounts.clone();
        let elsewhere = stores[usize::from(n + 1) % 3].accounts.clone();
        let admission = Admission::Invite(code);
        let new = NewAccount { admission, ..new_account(&format!("name{n}"), n) };
        attempts.spawn(async move {
            let outcome = accounts.register(new.clone()).await.expect("register");
            // The answer was lost, and the client has reached another edge.
            (outcome, elsewhere.register(new).await.expect("register"))
        });
    }
    let mut registered = BTreeSet::new();
    for outcome in attempts.join_all().await {
        match outcome {
            (Registration::Registered(one), Registration::Repeated(two)) if one == two => {
                registered.insert(one.0);
            }
            (Registration::InviteInvalid, Registration::InviteInvalid) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(registered.len(), USES);
    for stores in &stores {
        let listed = stores.invites.list(9).await.expect("list");
        assert_eq!(listed.iter().map(|invite| invite.uses_left).collect::<Vec<_>>(), [0]);
    }
    let accounts = servers.postgres.sql_in(&config.namespace, "SELECT count(*) FROM account");
    assert_eq!(accounts.await.expect("Postgres"), USES.to_string());
}
