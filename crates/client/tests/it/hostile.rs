//! Inboxes with messages that honest people do not send.

use qpq_client::{Client, Event, Identity, Messenger, Standing, methods, v1};

use crate::harness::{Server, dm, password, read, username};

async fn enqueue(client: &Client, to: &Messenger, payload: impl Into<Vec<u8>>) {
    let request = v1::EnqueueRequest {
        recipient_key: to.profile().identity.as_bytes().to_vec().into(),
        payload: payload.into().into(),
        ..Default::default()
    };
    client.call::<methods::Enqueue>(request).await.unwrap();
}

async fn drain(messenger: &Messenger) -> Vec<v1::Envelope> {
    let request = v1::FetchRequest { all_channels: true, ..Default::default() };
    messenger.client().call::<methods::Fetch>(request).await.unwrap().payloads
}

#[tokio::test]
async fn unreadable_bytes_are_shown_as_unreadable_and_acknowledged() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    alice.send(dm(&alice, "bob").await, "before").await.unwrap();
    for rubbish in [&b""[..], b"rubbish", &[0; 100], &[0xff; 5000]] {
        enqueue(alice.client(), &bob, rubbish).await;
    }
    alice.send(dm(&alice, "bob").await, "after").await.unwrap();
    let lines = read(&bob).await;
    assert_eq!(
        (lines.first().unwrap().as_str(), lines.last().unwrap().as_str()),
        ("alice: before", "alice: after")
    );
    assert_eq!(lines.len(), 6);
    assert!(lines[1..5].iter().all(|line| line.starts_with("unreadable: ")), "{lines:?}");
    assert!(drain(&bob).await.is_empty(), "everything was acknowledged");
}

#[tokio::test]
async fn each_of_reordered_and_duplicated_messages_is_shown_once() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    for text in ["one", "two", "three"] {
        alice.send(with_bob, text).await.unwrap();
    }
    let envelopes = drain(&bob).await;
    assert_eq!(envelopes.len(), 4);
    // The Welcome arrives last, and each message arrives twice.
    for envelope in envelopes.iter().rev().chain(&envelopes) {
        enqueue(bob.client(), &bob, envelope.data.to_vec()).await;
    }
    let mut lines = read(&bob).await;
    assert_eq!(lines.remove(0), "missing 1-4", "what another client took is noticed");
    lines.sort_unstable();
    assert_eq!(lines, ["alice: one", "alice: three", "alice: two"]);
    assert!(drain(&bob).await.is_empty());
}

#[tokio::test]
async fn a_claimed_name_of_another_account_is_refuted() {
    let server = Server::start().await;
    let [_alice, bob] = server.users(["alice", "bob"]).await;
    let mallory = server.client();
    let identity = Identity::generate();
    mallory.register(&username("mallory"), &password(), &identity, None).await.unwrap();
    mallory.login(&username("mallory"), &password()).await.unwrap();

    // Mallory's client claims to be alice.
    let fetch = v1::FetchKeyPackageRequest {
        identity_key: bob.profile().identity.as_bytes().to_vec().into(),
        ..Default::default()
    };
    let package = mallory.call::<methods::FetchKeyPackage>(fetch).await.unwrap().package;
    let mut mls = qpq_mls::Client::create(
        &qpq_mls::database::Database::in_memory(),
        identity.clone(),
        username("alice"),
    )
    .unwrap();
    let now = qpq_client::UnixMillis(0);
    let group = mls.create_direct(bob.profile().identity, now).unwrap();
    let added = qpq_mls::NewMember {
        identity: bob.profile().identity,
        username: username("bob"),
        key_package: package.to_vec(),
    };
    let change = qpq_mls::Change { add: vec![added], ..Default::default() };
    let commit = mls.commit(group, &change, system_now()).unwrap().unwrap();
    mls.confirm(group).unwrap();
    enqueue(&mallory, &bob, commit.welcome.unwrap()).await;
    let text = "it's me, Alice".into();
    let content = qpq_mls::Content { id: [1; 16], sent_at: 0, text, repeats: None, file: None };
    enqueue(&mallory, &bob, mls.encrypt(group, &content).unwrap().payload).await;

    let entries = bob.receive().await.unwrap();
    let Event::Received { from, .. } = &entries[0].event else { panic!("{entries:?}") };
    assert_eq!((from.standing, from.identity), (Standing::Refuted, identity.public()));
    assert_eq!(from.to_string(), format!("alice!{}", &identity.public().to_string()[..8]));
    let Event::NameRefuted { person, claimed } = &entries[1].event else { panic!("{entries:?}") };
    assert_eq!((person.identity, claimed.as_str()), (identity.public(), "alice"));
}

fn system_now() -> qpq_client::UnixMillis {
    use qpq_ports::Clock as _;
    qpq_ports::SystemClock.now()
}
