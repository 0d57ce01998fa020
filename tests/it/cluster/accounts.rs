//! Of concurrent registrations of a username or an identity key, at any edges, exactly one
//! succeeds.

use std::sync::Arc;

use bytes::Bytes;
use qpq_proto::{
    methods::{OpaqueRegisterFinish, ResolveUser},
    v1,
};
use qpq_tests::{
    accounts::{identity, login_with, registration, upload},
    cluster::{Cluster, EntryPoints, Plan},
    roaming::{CallOutcome, Roamer},
};
use tokio::{sync::Barrier, task::JoinSet};

const EDGES: usize = 2;
const RIVALS: usize = 6;
const NAMES: usize = 25;

/// Finishes all registrations concurrently, at the edges in turn. Returns the answers in order.
async fn race(
    entry_points: &EntryPoints,
    requests: &[v1::OpaqueRegisterFinishRequest],
) -> Vec<Result<(), String>> {
    let barrier = Arc::new(Barrier::new(requests.len()));
    let mut racing = JoinSet::new();
    for (place, request) in requests.iter().enumerate() {
        let (mut roamer, request) =
            (Roamer::at(entry_points, place % EDGES).patient(), request.clone());
        let barrier = Arc::clone(&barrier);
        racing.spawn(async move {
            roamer.connected().await;
            barrier.wait().await;
            let answer = match roamer.call::<OpaqueRegisterFinish>(&request, None).await {
                CallOutcome::Ok(response) => {
                    assert!(response.success);
                    Ok(())
                }
                CallOutcome::Refused(refused) => Err(refused.code),
                CallOutcome::Lost(_) => panic!("a registration was not answered"),
            };
            (place, answer)
        });
    }
    let mut answers = racing.join_all().await;
    answers.sort_by_key(|(place, _)| *place);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_registrations_of_a_username_exactly_one_succeeds() {
    let cluster = Cluster::start(Plan { edges: EDGES, ..Plan::default() }).await.unwrap();
    let entry_points = cluster.entry_points();
    let mut clients = Vec::new();
    for edge in 0..EDGES {
        clients.push(Roamer::at(&entry_points, edge).patient().connected().await);
    }
    for n in 0..NAMES {
        let name = format!("name-{n}");
        let mut requests = Vec::new();
        for rival in 0..RIVALS {
            let password = format!("{name} {rival}");
            let upload = upload(&clients[rival % EDGES], &name, password.as_bytes()).await.unwrap();
            requests.push(registration(&name, upload, &identity()));
        }
        let answers = race(&entry_points, &requests).await;
        let winners: Vec<usize> = (0..RIVALS).filter(|rival| answers[*rival].is_ok()).collect();
        let [winner] = winners[..] else {
            panic!("{name} has {} accounts: {answers:?}", winners.len())
        };
        let taken = Err("auth.username_taken".to_owned());
        assert_eq!(
            answers.iter().filter(|answer| **answer == taken).count(),
            RIVALS - 1,
            "{answers:?}"
        );

        for rival in 0..RIVALS {
            let password = format!("{name} {rival}");
            for client in &clients {
                let login = login_with(client, &name, password.as_bytes()).await.unwrap();
                assert_eq!(login.is_ok(), rival == winner, "{name}: {login:?}");
                if let Ok(token) = login {
                    let request =
                        v1::ResolveUserRequest { username: name.clone(), ..Default::default() };
                    let resolved =
                        client.must::<ResolveUser>(&request, Some(&token)).await.unwrap();
                    assert_eq!(resolved.identity_key, requests[winner].identity_key);
                }
            }
        }
        let again =
            race(&entry_points, &[requests[winner].clone(), requests[winner].clone()]).await;
        assert_eq!(again, [Ok(()), Ok(())], "the same registration again");
    }
    let rows = cluster
        .postgres
        .sql("SELECT count(*), count(DISTINCT username) FROM account")
        .await
        .unwrap();
    assert_eq!(rows, format!("{NAMES}|{NAMES}"));
    assert_eq!(
        cluster.postgres.sql("SELECT count(*) FROM inbox").await.unwrap(),
        NAMES.to_string()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_registrations_of_an_identity_key_exactly_one_succeeds() {
    let cluster = Cluster::start(Plan { edges: EDGES, ..Plan::default() }).await.unwrap();
    let entry_points = cluster.entry_points();
    let client = Roamer::at(&entry_points, 0).patient().connected().await;
    for n in 0..NAMES {
        let key: Bytes = identity();
        let mut requests = Vec::new();
        for rival in 0..RIVALS {
            let name = format!("name-{n}-{rival}");
            requests.push(registration(
                &name,
                upload(&client, &name, b"password").await.unwrap(),
                &key,
            ));
        }
        let answers = race(&entry_points, &requests).await;
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1, "{answers:?}");
        let taken = Err("auth.identity_taken".to_owned());
        assert_eq!(
            answers.iter().filter(|answer| **answer == taken).count(),
            RIVALS - 1,
            "{answers:?}"
        );
    }
    assert_eq!(
        cluster.postgres.sql("SELECT count(*) FROM account").await.unwrap(),
        NAMES.to_string()
    );
}
