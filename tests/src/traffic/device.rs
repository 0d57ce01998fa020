//! Devices of the inboxes: those that read until the end, and those that come and go.

use std::collections::BTreeSet;

use bytes::Bytes;
use qpq_domain::StoreId;
use qpq_proto::{
    methods::{FetchWait, Health, ListDevices, RegisterDevice, RevokeDevice},
    v1,
};
use rand::Rng as _;
use tokio::time::{Instant, sleep};

use super::{IDLE, Reader, WAIT, has_devices, party::Party, store_id, streams};
use crate::{
    accounts::{self, Account},
    client::Client,
    cluster::Cluster,
    roaming::{CallOutcome, PATIENCE, call_on},
};

/// The ids of the devices that stay.
const STAYING: [[u8; 16]; 2] = [[1; 16], [2; 16]];

/// The number of reads of a device before it is revoked.
const READS: std::ops::Range<u32> = 1..12;

/// Registers the devices that stay. Returns the readers of all inboxes.
pub(super) async fn readers(
    cluster: &Cluster,
    accounts: &[Account],
) -> anyhow::Result<Vec<Reader>> {
    let mut readers = Vec::new();
    for (inbox, account) in accounts.iter().enumerate() {
        if !has_devices(inbox) {
            let stream = streams(inbox).next().expect("at least one");
            readers.push(Reader { inbox, stream, token: account.token.clone() });
            continue;
        }
        for (stream, device) in streams(inbox).zip(STAYING) {
            let client = cluster.client(0).await?;
            let token = accounts::login(&client, &account.username).await?;
            client.must::<RegisterDevice>(&registration(device), Some(&token)).await?;
            readers.push(Reader { inbox, stream, token });
        }
    }
    Ok(readers)
}

/// The pages that a device has read in one history of the store.
#[derive(Debug, Default)]
struct DeviceReads {
    store: Option<StoreId>,
    pages: Vec<Vec<u64>>,
}

impl DeviceReads {
    /// Returns the first seq that is missing between two others.
    fn missing(&self) -> Option<u64> {
        let seqs: BTreeSet<u64> = self.pages.iter().flatten().copied().collect();
        seqs.iter()
            .zip(seqs.iter().skip(1))
            .find(|(one, next)| *one + 1 < **next)
            .map(|(one, _)| one + 1)
    }
}

fn registration(device: [u8; 16]) -> v1::RegisterDeviceRequest {
    v1::RegisterDeviceRequest {
        device_id: Bytes::copy_from_slice(&device),
        device_name: hex::encode(&device[..4]),
        ..Default::default()
    }
}

/// Returns the history of the store, as the edge knows it.
async fn store_of(client: &Client) -> Option<StoreId> {
    match call_on::<Health>(client, &v1::HealthRequest {}, None).await {
        CallOutcome::Ok(health) => Some(store_id(&health.store_id)),
        CallOutcome::Refused(_) | CallOutcome::Lost(_) => None,
    }
}

impl Party {
    /// Registers a device, reads on its position, and revokes it, again and again.
    pub(super) async fn visit(mut self, inbox: usize) {
        // The session is bound to no device, so that it outlives each of them.
        let token = self.state.accounts[inbox].token.clone();
        while !self.state.stopped() {
            let device: [u8; 16] = self.random.r#gen();
            // A registration of a session without a device binds it: the session of a device that
            // stays registers this one.
            let staying = self.state.readers.iter().find(|reader| reader.inbox == inbox);
            let registering = staying.expect("a device that stays").token.clone();
            // Before the registration, so that it is at most older than the registration's.
            let client = self.roamer.connected().await;
            let store = store_of(&client).await;
            let registered =
                self.until_done::<RegisterDevice>(&registration(device), &registering).await;
            if let (true, Some(store)) = (registered, store) {
                self.read_without_gaps(&token, device, store).await;
            }
            let device_id = Bytes::copy_from_slice(&device);
            let request = v1::RevokeDeviceRequest { device_id, ..Default::default() };
            self.until_done::<RevokeDevice>(&request, &registering).await;
            sleep(IDLE.mul_f64(self.random.r#gen())).await;
        }
    }

    /// Calls a method until it is answered, or the traffic ends. Returns whether it was.
    async fn until_done<M: qpq_proto::Method>(
        &mut self,
        request: &M::Request,
        token: &Bytes,
    ) -> bool {
        loop {
            if self.call::<M>(request, token).await.is_some() {
                return true;
            }
            if self.state.stopped() {
                return false;
            }
        }
    }

    /// Reads as a device, until it has no gap: every message since the registration is for every
    /// device. A gap may last as long as the lease of an edge that was killed.
    ///
    /// Ends at a lost answer, because its messages may be removed, and at a change of the history,
    /// because the new history may lack some of the device's reads and have later ones.
    async fn read_without_gaps(&mut self, token: &Bytes, device: [u8; 16], registered_in: StoreId) {
        let mut reads = DeviceReads::default();
        let mut left = self.random.gen_range(READS);
        let deadline = Instant::now() + PATIENCE;
        while reads.missing().is_some() || (left > 0 && !self.state.stopped()) {
            left = left.saturating_sub(1);
            assert!(Instant::now() < deadline, "a device misses messages: {reads:?}");
            let request = v1::FetchWaitRequest {
                timeout_ms: WAIT.as_millis() as u64 / 4,
                limit: self.random.gen_range(0..150),
                all_channels: true,
                device_id: Bytes::copy_from_slice(&device),
                ..Default::default()
            };
            let client = self.roamer.connected().await;
            self.state.note_reader(client.clone());
            let response = match call_on::<FetchWait>(&client, &request, Some(token)).await {
                CallOutcome::Ok(response) => response,
                CallOutcome::Refused(refused) if refused.code == "delivery.device_required" => {
                    // Only a store that went back in time forgets a registration.
                    assert_ne!(store_of(&client).await, Some(registered_in), "{refused:?}");
                    return;
                }
                CallOutcome::Refused(refused) => {
                    assert!(refused.is_temporary(), "a read is refused: {refused:?}");
                    self.roamer.pause().await;
                    continue;
                }
                CallOutcome::Lost(_) => return,
            };
            let store = store_id(&response.store_id);
            if *reads.store.get_or_insert(store) != store {
                return;
            }
            reads.pages.push(response.payloads.iter().map(|envelope| envelope.seq).collect());
        }
    }

    /// Revokes the devices that did not stay: a store that went back in time may have some again.
    pub(super) async fn revoke_visitors(mut self, token: &Bytes) {
        let list = v1::ListDevicesRequest::default();
        let listed = self.roamer.must::<ListDevices>(&list, Some(token)).await;
        for device in listed.devices {
            if !STAYING.iter().any(|staying| device.device_id == staying[..]) {
                let request =
                    v1::RevokeDeviceRequest { device_id: device.device_id, ..Default::default() };
                self.roamer.must::<RevokeDevice>(&request, Some(token)).await;
            }
        }
    }
}
