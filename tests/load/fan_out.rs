//! The cost of several devices, and of a message to a group, compared with single messages to
//! accounts without devices. The measurements are the same for a single node and for a cluster.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use qpq_proto::{
    methods::{AddMembers, BatchEnqueue, CreateChannel, Peek, RegisterDevice},
    v1,
};

use qpq_tests::{
    accounts::{self, Account},
    client::{Client, Pin},
};

use crate::{
    bench::{Series, Target},
    modes::{self, Stage, ending},
    open_loop::{Ending, Tally, closed_loop, open_loop},
};

const PAYLOAD: usize = 1_024;
/// The number of accounts in measurements of single messages.
const ACCOUNTS: usize = 64;
/// The number of single messages in flight.
const IN_FLIGHT: usize = 256;
/// The number of single messages in flight where they are compared with a message to a group: the
/// number of streams of one connection.
const PIPELINE: usize = 64;
const DEVICES: u8 = 4;
/// The maximum number of members in one AddMembers call.
const MAX_ADDED_PER_CALL: usize = 500;
/// The number of messages to the group in flight.
const GROUP_IN_FLIGHT: usize = 4;
/// Messages per second to other inboxes while messages are sent to the group.
const OTHERS_RATE: f64 = 100.0;

const ONE_READER: &str = "one reader";
const FOUR_DEVICES: &str = "four devices";
const PIPELINED: &str = "64 single in flight";
const SEQUENTIAL: &str = "one single after another";
const GROUP: &str = "one to the group";
const OTHERS: &str = "longest wait in ms";

/// A server or a cluster to measure.
pub(crate) struct Subject<C> {
    pub(crate) addr: SocketAddr,
    pub(crate) pin: Pin,
    /// Returns the CPU time of each kind of its processes, in microseconds.
    pub(crate) cpu: C,
}

pub(crate) type CpuTimes = Vec<(&'static str, f64)>;

impl<C: AsyncFn() -> anyhow::Result<CpuTimes>> Subject<C> {
    async fn stage(&self, accounts: usize) -> anyhow::Result<Arc<Stage>> {
        Stage::set(self.addr, self.pin, 64, accounts).await
    }

    /// Runs calls, and adds the CPU microseconds of one call, multiplied by `times`, to `figures`.
    async fn measure(
        &self,
        load: impl Future<Output = Tally>,
        (name, times): (&str, usize),
        figures: &mut Series,
    ) -> anyhow::Result<()> {
        let before = (self.cpu)().await?;
        let tally = load.await;
        anyhow::ensure!(tally.failed.is_empty(), "calls failed: {:?}", tally.failed);
        let after = (self.cpu)().await?;
        let scale = times as f64 / tally.answered as f64;
        let parts = before.iter().zip(&after).map(|(b, a)| (a.0, (a.1 - b.1) * scale));
        let mut total = 0.0;
        for (part, cpu) in parts {
            figures.add(format!("{name}, {part}"), cpu);
            total += cpu;
        }
        figures.add(name, total);
        Ok(())
    }

    /// Measures an Enqueue to an account without devices and to one with four devices. Each reader
    /// reads before the measurement, so that a cluster has its inbox in Redis.
    pub(crate) async fn devices(
        &self,
        duration: Duration,
        figures: &mut Series,
    ) -> anyhow::Result<()> {
        let one = self.stage(ACCOUNTS).await?;
        for account in &one.accounts {
            peek(one.client(0), &account.token).await?;
        }
        let four = self.stage(ACCOUNTS).await?;
        for (i, account) in four.accounts.iter().enumerate() {
            register_devices(four.client(i), account).await?;
        }
        self.measure(enqueues(&one, IN_FLIGHT, duration), (ONE_READER, 1), figures).await?;
        self.measure(enqueues(&four, IN_FLIGHT, duration), (FOUR_DEVICES, 1), figures).await
    }

    /// Measures a message to a group, as many single messages as the group has members, and the
    /// longest wait of messages to other inboxes while messages are sent to the group.
    pub(crate) async fn group(
        &self,
        members: usize,
        duration: Duration,
        figures: &mut Series,
    ) -> anyhow::Result<()> {
        let stage = self.stage(members).await?;
        let channel = create_group(&stage).await?;
        for (name, in_flight) in [(PIPELINED, PIPELINE), (SEQUENTIAL, 1)] {
            let load = enqueues(&stage, in_flight, duration);
            self.measure(load, (name, members), figures).await?;
        }
        let payload = Bytes::from(vec![7; PAYLOAD]);
        let send = |_| send_to_group(Arc::clone(&stage), channel.clone(), payload.clone());
        let sends = closed_loop(GROUP_IN_FLIGHT, duration, send);
        self.measure(sends, (GROUP, 1), figures).await?;

        let others = self.stage(ACCOUNTS).await?;
        let enqueue = |i| modes::enqueue(Arc::clone(&others), i, payload.clone());
        let (of_group, of_others) =
            tokio::join!(closed_loop(1, duration, send), open_loop(OTHERS_RATE, duration, enqueue));
        for tally in [&of_group, &of_others] {
            anyhow::ensure!(tally.failed.is_empty(), "calls failed: {:?}", tally.failed);
        }
        figures.add(OTHERS, of_others.latency.max() as f64 / 1e3);
        Ok(())
    }
}

async fn enqueues(stage: &Arc<Stage>, in_flight: usize, duration: Duration) -> Tally {
    let payload = Bytes::from(vec![7; PAYLOAD]);
    let enqueue = |i| modes::enqueue(Arc::clone(stage), i, payload.clone());
    closed_loop(in_flight, duration, enqueue).await
}

pub(crate) fn print_devices(figures: &Series) {
    println!("Enqueue to accounts with four devices compared with one reader, CPU µs");
    figures.show_parts();
    figures.print(FOUR_DEVICES, ONE_READER, Target::AtMost(1.3));
}

pub(crate) fn print_group(members: usize, figures: &Series) {
    println!("One message to {members} members compared with {members} single messages, CPU µs");
    figures.show_parts();
    figures.print(GROUP, SEQUENTIAL, Target::AtMost(0.1));
    figures.print(GROUP, PIPELINED, Target::AtMost(0.1));
    println!("The longest wait of an Enqueue to another inbox meanwhile (target ≤ 250)");
    figures.show(OTHERS);
}

async fn register_devices(client: &Client, account: &Account) -> anyhow::Result<()> {
    for device in 1..=DEVICES {
        // A registration binds the session to the device, so each device needs its own session.
        let token = accounts::login(client, &account.username).await?;
        let request = v1::RegisterDeviceRequest {
            device_id: Bytes::copy_from_slice(&[device; 16]),
            device_name: device.to_string(),
            ..Default::default()
        };
        client.must::<RegisterDevice>(&request, Some(&token)).await?;
        peek(client, &token).await?;
    }
    Ok(())
}

async fn peek(client: &Client, token: &Bytes) -> anyhow::Result<()> {
    let request = v1::PeekRequest { limit: 1, all_channels: true, ..Default::default() };
    client.must::<Peek>(&request, Some(token)).await.map(drop)
}

/// Creates a group of all accounts. Returns its channel.
async fn create_group(stage: &Stage) -> anyhow::Result<Bytes> {
    let (creator, others) = stage.accounts.split_first().context("a group has members")?;
    let token = Some(&creator.token[..]);
    let request = v1::CreateChannelRequest { name: "bench".into(), ..Default::default() };
    let created = stage.client(0).must::<CreateChannel>(&request, token).await?;
    for some in others.chunks(MAX_ADDED_PER_CALL) {
        let request = v1::AddMembersRequest {
            channel_id: created.channel_id.clone(),
            member_keys: some.iter().map(|account| account.identity.clone()).collect(),
            ..Default::default()
        };
        stage.client(0).must::<AddMembers>(&request, token).await?;
    }
    Ok(created.channel_id)
}

async fn send_to_group(stage: Arc<Stage>, channel_id: Bytes, payload: Bytes) -> Ending {
    let request = v1::BatchEnqueueRequest {
        channel_id,
        payload,
        to_members: true,
        message_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
        ..Default::default()
    };
    let token = &stage.accounts[0].token;
    let response = ending(stage.client(0).call::<BatchEnqueue>(&request, Some(token)).await)?;
    match response.results.first() {
        Some(result) if result.status == 0 => Ok(()),
        result => Err(format!("{result:?}")),
    }
}
