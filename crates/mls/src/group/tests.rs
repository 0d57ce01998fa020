//! Tests of members and outsiders that break the rules: messages that no honest client sends,
//! created with openmls directly.

use std::collections::BTreeSet;

use openmls::{
    group::{ProcessMessageError, ProposalValidationError, StageCommitError, ValidationError},
    prelude::{
        BasicCredential, CredentialWithKey, KeyPackage, KeyPackageIn, KeyPackageVerifyError,
        LeafNodeParameters, MlsMessageBodyIn, MlsMessageIn, NewSignerBundle, ProtocolVersion,
    },
    treesync::errors::LeafNodeValidationError,
};
use qpq_domain::{ChannelId, Username};
use tls_codec::DeserializeBytes as _;

use super::{process::unreadable, *};
use crate::{
    Arrival, Change, Client, Commit, Content, Identity, Ignored, NewMember, Received, Rules,
    packages::Use,
};

/// openmls compares lifetimes with the system's clock.
#[expect(clippy::disallowed_methods, reason = "the clock that openmls reads cannot be another")]
fn now() -> UnixMillis {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap())
}

trait ReceiveNow {
    fn receive_now(&mut self, bytes: &[u8]) -> Vec<Received>;
}

impl ReceiveNow for Client {
    fn receive_now(&mut self, bytes: &[u8]) -> Vec<Received> {
        self.receive(bytes, Arrival { at: now(), channel: ChannelId::DEFAULT }).unwrap()
    }
}

fn client(name: &str) -> Client {
    let name = Username::parse(name).unwrap();
    Client::create(&Database::in_memory(), Identity::generate(), name).unwrap()
}

/// Returns a package of `client` in openmls's type.
fn package(client: &mut Client) -> KeyPackage {
    package_of(&client.database, &client.leaf())
}

/// Returns a package for the leaf of `signer`, which need not be valid.
fn package_of(database: &Database, signer: &LeafSigner) -> KeyPackage {
    let bytes = packages::create(database, signer, Use::Once, now()).unwrap();
    let MlsMessageBodyIn::KeyPackage(package) =
        MlsMessageIn::tls_deserialize_exact_bytes(&bytes).unwrap().extract()
    else {
        panic!("a key package")
    };
    KeyPackageIn::validate(package, Store::default().crypto(), ProtocolVersion::Mls10).unwrap()
}

/// Returns a device of `client` with a fresh package, as the server offers it to others.
fn offer(client: &mut Client) -> NewMember {
    let key_package = client.key_packages(1, now()).unwrap().remove(0);
    offer_with(client, key_package)
}

fn offer_with(client: &Client, key_package: Vec<u8>) -> NewMember {
    NewMember { identity: client.identity.public(), username: client.username.clone(), key_package }
}

/// Commits a change, which the server accepts.
fn change(client: &mut Client, id: GroupId, change: &Change) -> Commit {
    let commit = client.commit(id, change, now()).unwrap().expect("it changes something");
    client.confirm(id).unwrap();
    commit
}

fn add(client: &mut Client, id: GroupId, others: &mut [&mut Client]) -> Commit {
    let add = others.iter_mut().map(|other| offer(other)).collect();
    change(client, id, &Change { add, ..Change::default() })
}

fn remove(client: &mut Client, id: GroupId, other: &Client) -> Commit {
    let remove = vec![other.identity.public()];
    change(client, id, &Change { remove, ..Change::default() })
}

/// Creates a group of `creator` and `others`, which have all joined.
fn group_of(creator: &mut Client, others: &mut [&mut Client]) -> GroupId {
    let id = creator.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let welcome = add(creator, id, others).welcome.unwrap();
    for other in others {
        assert!(matches!(other.receive_now(&welcome)[..], [Received::Joined { .. }]));
    }
    id
}

fn say(from: &mut Client, group: GroupId, text: &str) -> Vec<u8> {
    from.encrypt(
        group,
        &Content { id: [0; 16], sent_at: 0, text: text.into(), repeats: None, file: None },
    )
    .unwrap()
    .payload
}

/// Asserts that `to` can read the messages of `from`.
fn assert_reads(from: &mut Client, to: &mut Client, group: GroupId) {
    let message = say(from, group, "still there?");
    let received = to.receive_now(&message);
    assert!(matches!(received[..], [Received::Message { .. }]), "{received:?}");
}

/// Builds any commit of `client` in its group. The state of `client` does not change.
macro_rules! commit {
    ($client:expr, $id:expr, |$builder:ident| $build:expr) => {{
        let signer = $client.leaf();
        let group = $client.groups.get_mut(&$id).unwrap();
        let $builder = group.mls.commit_builder();
        let bundle = $build
            .load_psks(group.store.storage())
            .unwrap()
            .build(group.store.rand(), group.store.crypto(), &signer, |_| true)
            .unwrap()
            .stage_commit(&group.store)
            .unwrap();
        let (commit, welcome, _) = bundle.into_messages();
        group.mls.clear_pending_commit(group.store.storage()).unwrap();
        (commit.to_bytes().unwrap(), welcome.map(|welcome| welcome.to_bytes().unwrap()))
    }};
}

/// Builds a commit by which the leaf of `client` becomes that of `next`. The state of `client` does
/// not change.
fn becoming(client: &mut Client, id: GroupId, next: &LeafSigner) -> Vec<u8> {
    let current = client.leaf();
    let group = client.groups.get_mut(&id).unwrap();
    let bundle = NewSignerBundle { signer: next, credential_with_key: next.credential() };
    let builder = group.mls.commit_builder().load_psks(group.store.storage()).unwrap();
    let (rand, crypto) = (group.store.rand(), group.store.crypto());
    let built = builder.build_with_new_signer(rand, crypto, &current, bundle, |_| true).unwrap();
    let (commit, _, _) = built.stage_commit(&group.store).unwrap().into_messages();
    group.mls.clear_pending_commit(group.store.storage()).unwrap();
    commit.to_bytes().unwrap()
}

mod commits;
mod devices;
mod messages;
mod welcomes;
