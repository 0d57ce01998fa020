//! Linking further devices of an account, and revoking them.

use std::{path::PathBuf, time::Duration};

use qpq_client::{
    AuthError, ConversationId, Error, Event, LinkCode, LinkRequest, Linking, Messenger, Options,
    Password, ProfileError, Role, Trust, methods, v1,
};

use crate::harness::{
    Server, accept_and_read, crash_after, dm, history, password, read, restart, soon, username,
};
use crate::liar::Liar;

/// A patience that is longer than a test takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// The patience of a test that expects no approval.
const SHORT: Duration = Duration::from_millis(2500);

impl Server {
    fn device(&self, name: &str, device: &str) -> PathBuf {
        self.profile(&format!("{name}-{device}"))
    }

    async fn ask(&self, name: &str, device: &str) -> Linking {
        let dir = self.device(name, device);
        Messenger::link(&dir, self.options(), &username(name), &password(), device).await.unwrap()
    }

    /// Links a further device of a user, approved by an old one.
    async fn linked(&self, old: &Messenger, device: &str) -> Messenger {
        let linking = self.ask(old.profile().username.as_str(), device).await;
        Box::pin(approve(old, linking.code())).await.unwrap();
        soon(linking.finish(PATIENCE)).await.unwrap()
    }
}

async fn waiting(old: &Messenger) -> Vec<LinkRequest> {
    old.receive().await.unwrap();
    old.link_requests().await.unwrap()
}

async fn approve(old: &Messenger, code: LinkCode) -> Result<(), Error> {
    let waiting = waiting(old).await;
    let request = waiting.iter().find(|request| request.code == code);
    old.approve_link(request.ok_or(Error::NoSuchLinkRequest)?, &password()).await
}

/// Reads, and returns the texts without entries about devices.
async fn texts(messenger: &Messenger) -> Vec<String> {
    let read = read(messenger).await;
    read.into_iter().filter(|line| line.contains(": ")).collect()
}

async fn names(messenger: &Messenger) -> Vec<String> {
    let devices = messenger.devices().await.unwrap();
    devices.into_iter().map(|device| device.name).collect()
}

async fn devices_in(messenger: &Messenger, group: ConversationId, person: &str) -> Vec<String> {
    let members = messenger.group_members(group).await.unwrap();
    let of = members.into_iter().find(|one| one.person.username.as_str() == person).unwrap();
    let mut devices = of.devices;
    devices.sort();
    devices
}

#[tokio::test]
async fn a_linked_device_shows_every_message_once_and_sends_as_the_account() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "before").await.unwrap();
    let with_alice = dm(&bob, "alice").await;
    read(&bob).await;
    bob.send(with_alice, "before, too").await.unwrap();
    let group = alice.create_group("friends").await.unwrap();
    alice.add(group, &username("bob")).await.unwrap();
    alice.add(group, &username("carol")).await.unwrap();
    accept_and_read(&bob).await;
    accept_and_read(&carol).await;
    alice.block(carol.profile().identity).await.unwrap();
    alice.mark_compared(&username("bob")).await.unwrap();
    read(&alice).await;

    let linking = server.ask("alice", "laptop").await;
    alice.receive().await.unwrap();
    assert_eq!(read(&alice).await, ["laptop asks to be linked"]);
    let [request] = &waiting(&alice).await[..] else { panic!("one request waits") };
    assert_eq!((request.name.as_str(), request.code), ("laptop", linking.code()));
    alice.approve_link(request, &password()).await.unwrap();
    let laptop = soon(linking.finish(PATIENCE)).await.unwrap();
    assert!(waiting(&alice).await.is_empty());
    assert_eq!(laptop.profile().identity, alice.profile().identity);
    assert_eq!(names(&laptop).await, ["first device", "laptop"]);

    // The new device knows people as the old one does.
    assert!(laptop.compared_at(&bob.profile().identity).await.unwrap().is_some());
    let blocked = laptop.blocked().await.unwrap();
    assert_eq!(blocked.len(), 1);
    assert_eq!(blocked[0].identity, carol.profile().identity);
    alice.unblock(carol.profile().identity).await.unwrap();
    laptop.unblock(carol.profile().identity).await.unwrap();

    for messenger in [&alice, &bob, &carol, &laptop] {
        texts(messenger).await;
    }
    assert_eq!(devices_in(&bob, group, "alice").await, ["first device", "laptop"]);
    bob.send(with_alice, "to both").await.unwrap();
    carol.send(group, "to all").await.unwrap();
    for device in [&alice, &laptop] {
        assert_eq!(texts(device).await, ["bob: to both", "carol: to all"]);
    }
    laptop.send(with_bob, "from the laptop").await.unwrap();
    laptop.send(group, "to the group").await.unwrap();
    alice.send(with_bob, "from the first").await.unwrap();
    assert_eq!(
        texts(&bob).await,
        ["carol: to all", "alice: from the laptop", "alice: to the group", "alice: from the first"]
    );
    assert_eq!(texts(&carol).await, ["alice: to the group"]);
    assert_eq!(texts(&alice).await, ["me: from the laptop", "me: to the group"]);
    assert_eq!(texts(&laptop).await, ["me: from the first"]);
    for messenger in [&alice, &bob, &carol, &laptop] {
        assert!(texts(messenger).await.is_empty(), "nothing is shown twice");
    }
    let shown = history(&laptop, with_bob).await;
    let shown: Vec<_> = shown.into_iter().filter(|line| line.contains(": ")).collect();
    assert_eq!(shown, ["bob: to both", "me: from the laptop", "me: from the first"]);
}

#[tokio::test]
async fn a_linked_device_continues_after_it_was_closed() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    read(&bob).await;
    let laptop = server.linked(&alice, "laptop").await;
    drop(laptop);
    let with_alice = dm(&bob, "alice").await;
    bob.send(with_alice, "are you there?").await.unwrap();
    let laptop = Messenger::unlock(&server.device("alice", "laptop"), &password()).await.unwrap();
    assert_eq!(texts(&laptop).await, ["bob: are you there?"]);
    assert_eq!(texts(&alice).await, ["bob: are you there?"]);
    // Messages of a later contact reach both devices.
    let carol = server.user("carol").await;
    let with_alice = dm(&carol, "alice").await;
    carol.send(with_alice, "hi").await.unwrap();
    for device in [&alice, &laptop] {
        assert_eq!(texts(device).await, ["carol: hi"]);
    }
}

#[tokio::test]
async fn nothing_is_linked_with_a_wrong_password_or_code() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    assert!(waiting(&alice).await.is_empty());
    let wrong = Password::from("wrong");
    let dir = server.device("alice", "laptop");
    let refused =
        Messenger::link(&dir, server.options(), &username("alice"), &wrong, "laptop").await;
    assert!(matches!(refused, Err(Error::Auth(AuthError::WrongPassword))), "{refused:?}");
    let taken = server.profile("alice");
    let refused =
        Messenger::link(&taken, server.options(), &username("alice"), &password(), "x").await;
    assert!(matches!(refused, Err(Error::Profile(ProfileError::Exists(_)))), "{refused:?}");

    let linking = server.ask("alice", "laptop").await;
    let refused = approve(&alice, "00000-00000".parse().unwrap()).await;
    assert!(matches!(refused, Err(Error::NoSuchLinkRequest)), "{refused:?}");
    let [request] = &waiting(&alice).await[..] else { panic!("one request waits") };
    let refused = alice.approve_link(request, &wrong).await;
    assert!(matches!(refused, Err(Error::Auth(AuthError::WrongPassword))), "{refused:?}");
    assert_eq!(names(&alice).await, ["first device"]);
    let refused = linking.finish(SHORT).await;
    assert!(matches!(refused, Err(Error::LinkNotApproved)), "{refused:?}");
    assert!(!dir.join("profile.json").exists());
}

/// Puts a payload into the own inbox, as a dishonest server could.
async fn put(alice: &Messenger, payload: Vec<u8>, channel: [u8; 16]) {
    let request = v1::EnqueueRequest {
        recipient_key: alice.profile().identity.as_bytes().to_vec().into(),
        payload: payload.into(),
        channel_id: channel.to_vec().into(),
        ..Default::default()
    };
    alice.client().call::<methods::Enqueue>(request).await.unwrap();
}

fn channel(parts: &[&[u8]]) -> [u8; 16] {
    use sha2::{Digest as _, Sha256};
    Sha256::digest(parts.concat())[..16].try_into().unwrap()
}

#[tokio::test]
async fn a_forged_grant_is_refused_and_the_genuine_one_still_counts() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let liar = Liar::before(&server);
    let options = Options::new(liar.addr().to_string(), Trust::Pinned(liar.fingerprint));
    let ask = async |device: &str| {
        let dir = server.device("alice", device);
        let linking =
            Messenger::link(&dir, options.clone(), &username("alice"), &password(), device).await;
        linking.unwrap()
    };
    let forge = |mut page: v1::PeekResponse| {
        for envelope in &mut page.payloads {
            if envelope.data.starts_with(b"QPQG") {
                envelope.data =
                    b"QPQGsealed by the server itself, to the key in the request"[..].into();
            }
        }
        page
    };
    liar.lie(forge);
    let linking = ask("laptop").await;
    approve(&alice, linking.code()).await.unwrap();
    let refused = linking.finish(SHORT).await;
    assert!(matches!(refused, Err(Error::LinkGrantForged)), "{refused:?}");
    assert!(!server.device("alice", "laptop").join("profile.json").exists());

    let linking = ask("phone").await;
    approve(&alice, linking.code()).await.unwrap();
    let finished = tokio::spawn(linking.finish(PATIENCE));
    tokio::time::sleep(SHORT).await;
    assert!(!finished.is_finished());
    liar.be_honest();
    soon(finished).await.unwrap().unwrap();
    // The other devices show nothing about the forged grants.
    let shown = read(&alice).await;
    assert_eq!(shown, ["laptop asks to be linked"]);
}

#[tokio::test]
async fn a_request_with_an_invalid_signature_does_not_wait() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let requests = channel(&[b"qpq/link/1", alice.profile().identity.as_bytes()]);
    put(&alice, b"QPQLnot a request".to_vec(), requests).await;
    assert!(read(&alice).await.is_empty(), "nothing is shown");
    assert!(alice.link_requests().await.unwrap().is_empty());
}

#[tokio::test]
async fn two_devices_are_linked_at_the_same_time() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    read(&bob).await;
    let (one, other) = (server.ask("alice", "laptop").await, server.ask("alice", "phone").await);
    assert_eq!(waiting(&alice).await.len(), 2);
    for linking in [&other, &one] {
        approve(&alice, linking.code()).await.unwrap();
    }
    let (laptop, phone) = soon(async {
        tokio::join!(Box::pin(one.finish(PATIENCE)), Box::pin(other.finish(PATIENCE)))
    })
    .await;
    let (laptop, phone) = (laptop.unwrap(), phone.unwrap());
    let mut found = names(&phone).await;
    found.sort();
    assert_eq!(found, ["first device", "laptop", "phone"]);
    for messenger in [&alice, &bob, &laptop, &phone] {
        texts(messenger).await;
    }
    bob.send(dm(&bob, "alice").await, "to all three").await.unwrap();
    for device in [&alice, &laptop, &phone] {
        assert_eq!(texts(device).await, ["bob: to all three"]);
    }
    phone.send(with_bob, "from the phone").await.unwrap();
    for device in [&alice, &laptop] {
        assert_eq!(texts(device).await, ["me: from the phone"]);
    }
}

#[tokio::test]
async fn a_link_that_was_interrupted_is_repeated_and_its_device_revoked() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let lost = server.ask("alice", "laptop").await;
    let [request] = &waiting(&alice).await[..] else { panic!("one request waits") };
    // Approving twice is harmless.
    alice.approve_link(request, &password()).await.unwrap();
    alice.approve_link(request, &password()).await.unwrap();
    let device = lost.device();
    drop(lost);
    assert_eq!(names(&alice).await, ["first device", "laptop"]);
    let again = server.ask("alice", "laptop").await;
    assert_eq!(names(&alice).await, ["first device"]);
    approve(&alice, again.code()).await.unwrap();
    let laptop = soon(again.finish(PATIENCE)).await.unwrap();
    assert_eq!(names(&laptop).await, ["first device", "laptop"]);
    assert!(!server.device("alice", "laptop").join("linking").exists());
    laptop.revoke_device(device).await.unwrap();
    assert_eq!(names(&laptop).await, ["first device", "laptop"]);
}

#[tokio::test]
async fn a_crash_of_the_new_device_leaves_no_profile_or_a_complete_one() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    read(&bob).await;
    let dir = server.device("alice", "laptop");
    let mut whole = None;
    for polls in (1..200).step_by(3) {
        let linking = server.ask("alice", "laptop").await;
        approve(&alice, linking.code()).await.unwrap();
        let device = linking.device();
        let finished = soon(crash_after(polls, linking.finish(PATIENCE))).await;
        let has_ended = finished.is_some();
        drop(finished);
        let lock = std::fs::File::open(dir.join("lock")).unwrap();
        tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
        if dir.join("profile.json").exists() {
            whole = Some(has_ended);
            break;
        }
        alice.revoke_device(device).await.unwrap();
    }
    assert!(whole.is_some(), "it never came to an end");
    let laptop = Messenger::unlock(&dir, &password()).await.unwrap();
    laptop.receive().await.unwrap();
    bob.send(dm(&bob, "alice").await, "again").await.unwrap();
    assert_eq!(texts(&laptop).await, ["bob: again"]);
}

#[tokio::test]
async fn a_revoked_device_neither_reads_nor_is_written_to() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let group = alice.create_group("friends").await.unwrap();
    alice.add(group, &username("bob")).await.unwrap();
    accept_and_read(&bob).await;
    let laptop = server.linked(&alice, "laptop").await;
    assert_eq!(devices_in(&laptop, group, "alice").await, ["first device", "laptop"]);
    let refused = alice.revoke_device(alice.device_id().await.unwrap().unwrap()).await;
    assert!(matches!(refused, Err(Error::ThisDevice)), "{refused:?}");

    let device = laptop.device_id().await.unwrap().unwrap();
    alice.receive().await.unwrap();
    alice.revoke_device(device).await.unwrap();
    let ended = laptop.receive().await.unwrap_err();
    assert!(ended.is_unauthorized(), "{ended:?}");
    read(&bob).await;
    assert_eq!(devices_in(&bob, group, "alice").await, ["first device"]);
    bob.send(group, "without the laptop").await.unwrap();
    assert_eq!(texts(&alice).await, ["bob: without the laptop"]);

    // A login does not make the revoked machine a device again.
    let (dir, key) = (server.device("alice", "laptop"), laptop.vault_key().await);
    drop(laptop);
    restart(&dir, &key).await;
    let laptop = Messenger::unlock(&dir, &password()).await.unwrap();
    let refused = laptop.receive().await;
    assert!(matches!(refused, Err(Error::DeviceRevoked)), "{refused:?}");
    assert!(laptop.is_revoked().await);
    let refused = laptop.rename_device("again").await;
    assert!(matches!(refused, Err(Error::DeviceRevoked)), "{refused:?}");
    assert_eq!(names(&alice).await, ["first device"]);
}

#[tokio::test]
async fn other_devices_see_the_new_name_of_a_renamed_device() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let laptop = server.linked(&alice, "laptop").await;
    laptop.rename_device("old laptop").await.unwrap();
    assert_eq!(names(&alice).await, ["first device", "old laptop"]);
    for bad in ["", "a\tb", &"x".repeat(65)] {
        let refused = laptop.rename_device(bad).await;
        assert!(matches!(refused, Err(Error::DeviceName { max: 64 })), "{bad}");
    }
    let listed = laptop.devices().await.unwrap();
    assert_eq!(listed.iter().map(|one| one.is_this).collect::<Vec<_>>(), [false, true]);
}

#[tokio::test]
async fn a_seventeenth_device_is_refused_until_another_is_revoked() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    for n in 1..16 {
        let linking = server.ask("alice", &n.to_string()).await;
        approve(&alice, linking.code()).await.unwrap();
    }
    let linking = server.ask("alice", "one too many").await;
    let refused = approve(&alice, linking.code()).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the account has 16 devices, the most that it may have; revoke one first"
    );
    let first = alice.devices().await.unwrap().into_iter().find(|one| !one.is_this).unwrap();
    alice.revoke_device(first.id).await.unwrap();
    approve(&alice, linking.code()).await.unwrap();
    let last = soon(linking.finish(PATIENCE)).await.unwrap();
    assert_eq!(last.devices().await.unwrap().len(), 16);
}

#[tokio::test]
async fn a_linked_device_is_an_admin_where_its_account_is() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = alice.create_group("friends").await.unwrap();
    alice.add(group, &username("bob")).await.unwrap();
    accept_and_read(&bob).await;
    let laptop = server.linked(&alice, "laptop").await;
    laptop.add(group, &username("carol")).await.unwrap();
    laptop.set_role(group, bob.profile().identity, Role::Admin).await.unwrap();
    accept_and_read(&carol).await;
    laptop.send(group, "welcome").await.unwrap();
    for messenger in [&bob, &carol] {
        assert_eq!(texts(messenger).await.last().unwrap(), "alice: welcome");
    }
    assert_eq!(texts(&alice).await.last().unwrap(), "me: welcome");
    assert_eq!(devices_in(&carol, group, "alice").await, ["first device", "laptop"]);
}

#[tokio::test]
async fn a_group_that_the_server_does_not_know_yet_is_joined_with_its_first_commit() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let group = alice.create_group("plans").await.unwrap();
    let laptop = server.linked(&alice, "laptop").await;
    assert!(read(&laptop).await.is_empty(), "it is not an error");
    alice.add(group, &username("bob")).await.unwrap();
    accept_and_read(&bob).await;
    texts(&laptop).await;
    assert!(laptop.requests().await.unwrap().waiting.is_empty(), "we are an acquaintance");
    bob.send(group, "hello").await.unwrap();
    for device in [&alice, &laptop] {
        assert_eq!(texts(device).await, ["bob: hello"]);
    }
    assert_eq!(devices_in(&bob, group, "alice").await, ["first device", "laptop"]);
}

#[tokio::test]
async fn a_device_that_was_killed_before_it_joined_joins_when_it_is_opened() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    read(&bob).await;
    let linking = server.ask("alice", "laptop").await;
    approve(&alice, linking.code()).await.unwrap();
    let dir = server.device("alice", "laptop");
    let file = dir.join("profile.json");
    let complete = async {
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(async {
        tokio::select! {
            biased;
            () = complete => {}
            _ = Box::pin(linking.finish(PATIENCE)) => {}
        }
    })
    .await;
    let lock = std::fs::File::open(dir.join("lock")).unwrap();
    tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
    let laptop = Messenger::unlock(&dir, &password()).await.unwrap();
    assert!(laptop.conversations().await.unwrap().is_empty(), "nothing was joined yet");
    laptop.receive().await.unwrap();
    bob.send(dm(&bob, "alice").await, "are you there?").await.unwrap();
    assert_eq!(texts(&laptop).await, ["bob: are you there?"]);
}

#[tokio::test]
async fn a_contact_of_one_device_is_not_a_stranger_to_the_other_devices() {
    let server = Server::start().await;
    let [alice, bob, carol, dave] = [
        server.user("alice").await,
        server.user("bob").await,
        server.user("carol").await,
        server.user("dave").await,
    ];
    let laptop = server.linked(&alice, "laptop").await;
    texts(&alice).await;
    // Alice writes to bob, who then invites her.
    alice.send(dm(&alice, "bob").await, "hello").await.unwrap();
    read(&bob).await;
    let work = bob.create_group("work").await.unwrap();
    bob.add(work, &username("alice")).await.unwrap();
    // Alice accepts a request that waits on both devices.
    let fun = carol.create_group("fun").await.unwrap();
    carol.add(fun, &username("alice")).await.unwrap();
    for device in [&alice, &laptop] {
        device.receive().await.unwrap();
        let waiting = device.requests().await.unwrap().waiting;
        let waiting: Vec<_> = waiting.iter().map(|request| request.group.as_deref()).collect();
        assert_eq!(waiting, [Some("fun")]);
    }
    accept_and_read(&alice).await;
    texts(&laptop).await;
    assert!(laptop.requests().await.unwrap().waiting.is_empty());
    // Alice declines and blocks.
    let offers = dave.create_group("offers").await.unwrap();
    dave.add(offers, &username("alice")).await.unwrap();
    laptop.receive().await.unwrap();
    let [offer] = &laptop.requests().await.unwrap().waiting[..] else { panic!("one waits") };
    laptop.decline(offer.id).await.unwrap();
    laptop.block(dave.profile().identity).await.unwrap();
    laptop.mark_compared(&username("carol")).await.unwrap();
    texts(&alice).await;
    assert!(alice.requests().await.unwrap().waiting.is_empty());
    assert_eq!(alice.blocked().await.unwrap()[0].identity, dave.profile().identity);
    assert!(alice.compared_at(&carol.profile().identity).await.unwrap().is_some());

    bob.send(work, "to work").await.unwrap();
    carol.send(fun, "to have fun").await.unwrap();
    for device in [&alice, &laptop] {
        assert_eq!(texts(device).await, ["bob: to work", "carol: to have fun"]);
    }
    alice.unblock(dave.profile().identity).await.unwrap();
    texts(&laptop).await;
    assert!(laptop.blocked().await.unwrap().is_empty());

    // A decision counts for the messages after it, even if all are read together.
    alice.block(bob.profile().identity).await.unwrap();
    texts(&laptop).await;
    alice.unblock(bob.profile().identity).await.unwrap();
    bob.send(work, "unblocked").await.unwrap();
    assert_eq!(texts(&laptop).await, ["bob: unblocked"]);
    alice.block(bob.profile().identity).await.unwrap();
    bob.send(work, "blocked").await.unwrap();
    assert!(texts(&laptop).await.is_empty());
}

/// Returns the removals among the received entries: the member that removed, and the removed
/// members.
async fn removals(messenger: &Messenger) -> Vec<(Option<String>, String)> {
    let entries = messenger.receive().await.unwrap();
    let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    messenger.mark_seen(&ids).await.unwrap();
    let removal = |entry: qpq_client::Entry| match entry.event {
        Event::Removed { by, members } => {
            Some((by.map(|by| by.to_string()), members[0].to_string()))
        }
        _ => None,
    };
    entries.into_iter().filter_map(removal).collect()
}

#[tokio::test]
async fn members_see_who_left_and_who_was_removed_by_which_member() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let laptop = server.linked(&alice, "laptop").await;
    let group = bob.create_group("friends").await.unwrap();
    for name in ["alice", "carol"] {
        bob.add(group, &username(name)).await.unwrap();
    }
    for user in [&alice, &laptop, &carol] {
        accept_and_read(user).await;
    }
    alice.leave(group).await.unwrap();
    let by = |by: &str, member: &str| [(Some(by.to_owned()), member.to_owned())];
    assert_eq!(removals(&laptop).await, by("alice", "alice"), "left on another device");
    for user in [&bob, &carol] {
        assert_eq!(removals(user).await, [(None, "alice".to_owned())]);
    }
    bob.remove(group, carol.profile().identity).await.unwrap();
    assert_eq!(removals(&carol).await, by("bob", "carol"));
    assert!(removals(&laptop).await.is_empty());
}
