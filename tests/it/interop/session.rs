//! The calls to the server that an MLS member needs, in the terms of docs/client.md.

use bytes::Bytes;
use ed25519_dalek::SigningKey;
use qpq_proto::{
    methods::{
        Ack, AddMembers, BatchEnqueue, CreateChannel, FetchGroupInfo, FetchKeyPackage, Method,
        OpaqueRegisterFinish, Peek, RegisterDevice, RemoveMember, ResolveUser, RevokeDevice,
        UploadKeyPackage,
    },
    v1,
};
use qpq_tests::{
    accounts::{login_with, registration, upload},
    client::Client,
};

use super::profile::{DeviceCredential, Key};
use crate::server::Running;

const PASSWORD: &[u8] = b"a foreign client";

/// A session of an account, on a connection of its own.
pub(crate) struct Session {
    client: Client,
    token: Bytes,
    pub(crate) username: String,
    key: SigningKey,
    pub(crate) account: Key,
    read_up_to: u64,
}

/// A device of an account.
pub(crate) struct Device {
    pub(crate) id: [u8; 16],
    pub(crate) key: SigningKey,
    pub(crate) credential: DeviceCredential,
}

/// A commit as it is offered to the server.
pub(crate) struct Offer {
    /// Empty for all members of the group.
    pub(crate) recipients: Vec<Key>,
    pub(crate) payload: Bytes,
    pub(crate) group_info: Bytes,
}

/// The answer of the server to a commit.
pub(crate) enum Offered {
    Accepted { epoch: u64 },
    Stale { epoch: u64 },
}

impl Session {
    /// Registers an account and logs in.
    pub(crate) async fn register(running: &Running, username: &str) -> Self {
        let client = running.connect().await;
        let key = SigningKey::from_bytes(&rand::random());
        let account = Bytes::copy_from_slice(key.verifying_key().as_bytes());
        let opaque = upload(&client, username, PASSWORD).await.expect("a registration");
        let request = registration(username, opaque, &account);
        client.must::<OpaqueRegisterFinish>(&request, None).await.expect("the name is free");
        Self::log_in(client, username, key).await
    }

    /// Logs in to the same account from another connection.
    pub(crate) async fn another(&self, running: &Running) -> Self {
        Self::log_in(running.connect().await, &self.username, self.key.clone()).await
    }

    async fn log_in(client: Client, username: &str, key: SigningKey) -> Self {
        let session = login_with(&client, username, PASSWORD).await.expect("an answer");
        let token = session.expect("the password is right");
        let account = key.verifying_key().to_bytes();
        Self { client, token, username: username.into(), key, account, read_up_to: 0 }
    }

    /// The identity key's pair, which signs the leaf of an account without devices.
    pub(crate) fn key(&self) -> &SigningKey {
        &self.key
    }

    /// Registers a device, to which the session then belongs.
    pub(crate) async fn register_device(&self, name: &str) -> Device {
        let id: [u8; 16] = rand::random();
        let key = SigningKey::from_bytes(&rand::random());
        let public = key.verifying_key().to_bytes();
        let credential = DeviceCredential::certified(&self.key, &self.username, id, name, &public);
        let request = v1::RegisterDeviceRequest {
            device_id: id.to_vec().into(),
            device_name: name.into(),
            device_key: public.to_vec().into(),
            device_proof: credential.device_proof.clone().into(),
            ..Default::default()
        };
        self.call::<RegisterDevice>(&request).await;
        Device { id, key, credential }
    }

    /// Revokes a device of the account.
    pub(crate) async fn revoke_device(&self, id: [u8; 16]) {
        let request =
            v1::RevokeDeviceRequest { device_id: id.to_vec().into(), ..Default::default() };
        self.call::<RevokeDevice>(&request).await;
    }

    async fn call<M: Method>(&self, request: &M::Request) -> M::Response {
        self.client.must::<M>(request, Some(&self.token)).await.expect("the server does it")
    }

    pub(crate) async fn upload_packages(&self, once: Vec<Bytes>, last_resort: Bytes) {
        let once = v1::UploadKeyPackageRequest { more_packages: once, ..Default::default() };
        let last_resort = v1::UploadKeyPackageRequest {
            package: last_resort,
            last_resort: true,
            ..Default::default()
        };
        for request in [once, last_resort] {
            self.call::<UploadKeyPackage>(&request).await;
        }
    }

    /// Returns a KeyPackage of each device of an account, or the one of an account without devices.
    pub(crate) async fn packages_of(&self, account: &Key) -> Vec<Bytes> {
        let request = v1::FetchKeyPackageRequest {
            identity_key: account.to_vec().into(),
            all_devices: true,
            ..Default::default()
        };
        let answer = self.call::<FetchKeyPackage>(&request).await;
        let of_devices = answer.packages.into_iter().map(|device| device.package);
        of_devices.chain([answer.package]).filter(|package| !package.is_empty()).collect()
    }

    pub(crate) async fn resolve(&self, username: &str) -> Key {
        let request = v1::ResolveUserRequest { username: username.into(), ..Default::default() };
        self.call::<ResolveUser>(&request).await.identity_key[..].try_into().expect("a key")
    }

    /// Returns and acknowledges the next messages of the inbox; none at its end.
    pub(crate) async fn next_messages(&mut self) -> Vec<Bytes> {
        let request = v1::PeekRequest {
            all_channels: true,
            after_seq: self.read_up_to,
            ..Default::default()
        };
        let page = self.call::<Peek>(&request).await.payloads;
        if let Some(last) = page.last() {
            self.read_up_to = last.seq;
            let ack =
                v1::AckRequest { all_channels: true, seq_up_to: last.seq, ..Default::default() };
            self.call::<Ack>(&ack).await;
        }
        page.into_iter().map(|envelope| envelope.data).collect()
    }

    pub(crate) async fn enqueue(&self, recipients: &[Key], payload: Bytes, channel: &[u8]) {
        let request = v1::BatchEnqueueRequest {
            recipient_keys: keys(recipients),
            payload,
            channel_id: Bytes::copy_from_slice(channel),
            message_id: message_id(),
            ..Default::default()
        };
        let answer = self.call::<BatchEnqueue>(&request).await;
        assert!(answer.results.iter().all(|result| result.status == 0), "{answer:?}");
    }

    /// Offers a commit for this epoch of the server's record of the group.
    pub(crate) async fn offer(&self, channel: &[u8], epoch: u64, offer: &Offer) -> Offered {
        let request = v1::BatchEnqueueRequest {
            recipient_keys: keys(&offer.recipients),
            to_members: offer.recipients.is_empty(),
            payload: offer.payload.clone(),
            channel_id: Bytes::copy_from_slice(channel),
            message_id: message_id(),
            commit: true,
            expected_epoch: epoch,
            group_info: offer.group_info.clone(),
            ..Default::default()
        };
        let answer = self.client.call::<BatchEnqueue>(&request, Some(&self.token)).await;
        match answer.expect("an answer") {
            Ok(answer) => Offered::Accepted { epoch: answer.epoch },
            Err(refused) if refused.code == "delivery.stale_epoch" => {
                Offered::Stale { epoch: refused.epoch }
            }
            Err(refused) => panic!("the server refuses the commit: {refused:?}"),
        }
    }

    /// Creates the server's record of a group that has no other member yet.
    pub(crate) async fn create_group(&self, channel: [u8; 16]) {
        let request =
            v1::CreateChannelRequest { channel_id: channel.to_vec().into(), ..Default::default() };
        assert!(self.call::<CreateChannel>(&request).await.was_new);
    }

    /// Creates the server's record of a direct conversation.
    pub(crate) async fn create_direct(&self, peer: &Key, channel: [u8; 16]) {
        let request = v1::CreateChannelRequest {
            peer_key: peer.to_vec().into(),
            channel_id: channel.to_vec().into(),
            ..Default::default()
        };
        let answer = self.call::<CreateChannel>(&request).await;
        assert_eq!(answer.channel_id[..], channel);
    }

    pub(crate) async fn add_members(&self, channel: &[u8], members: &[Key]) {
        let request = v1::AddMembersRequest {
            channel_id: Bytes::copy_from_slice(channel),
            member_keys: keys(members),
            ..Default::default()
        };
        self.call::<AddMembers>(&request).await;
    }

    pub(crate) async fn remove_member(&self, channel: &[u8], member: &Key) {
        let request = v1::RemoveMemberRequest {
            channel_id: Bytes::copy_from_slice(channel),
            member_key: member.to_vec().into(),
            ..Default::default()
        };
        self.call::<RemoveMember>(&request).await;
    }

    /// Returns the GroupInfo of the last commit, and the server's epoch.
    pub(crate) async fn group_info(&self, channel: &[u8]) -> (Bytes, u64) {
        let request = v1::FetchGroupInfoRequest {
            channel_id: Bytes::copy_from_slice(channel),
            ..Default::default()
        };
        let answer = self.call::<FetchGroupInfo>(&request).await;
        (answer.group_info, answer.epoch)
    }
}

fn keys(keys: &[Key]) -> Vec<Bytes> {
    keys.iter().map(|key| key.to_vec().into()).collect()
}

fn message_id() -> Bytes {
    Bytes::copy_from_slice(&rand::random::<[u8; 16]>())
}
