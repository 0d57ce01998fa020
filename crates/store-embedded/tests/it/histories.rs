//! Random histories, executed on the store and on a model. Every answer is compared. Histories
//! contain crashes: in one test the store loses its runtime, in the other its process is killed.

use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError},
};
use qpq_domain::UnixMillis;

use crate::{
    backend::Process,
    child::Child,
    model::Model,
    ops::{
        GROUP, GroupSend, MEMBERS, MINUTE, Machine, Message, OF_AN_ACCOUNT, Op, Package, START,
        limits,
    },
};

#[derive(Clone, Debug)]
enum Step {
    Do(Op),
    Advance { minutes: u8 },
    Crash,
}

/// Returns a strategy for operations. The operations have four accounts, of which three exist from
/// the start, three channels and that of a group, and five ids: few enough that operations often
/// concern the same account, channel or id.
fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => inbox_op(),
        4 => key_op(),
        3 => session_op(),
        2 => account_op(),
        3 => device_op(),
        1 => block_op(),
        1 => bundle_op(),
        1 => Just(Op::Sweep),
    ]
}

fn account() -> impl Strategy<Value = u8> {
    // Account 1 has devices from the start, so it is in more operations than the others.
    prop_oneof![3 => Just(1_u8), 4 => 1..=4_u8]
}

fn device() -> impl Strategy<Value = u8> {
    1..=3_u8
}

fn reader() -> impl Strategy<Value = Option<u8>> {
    // Often no device, as for accounts without devices.
    prop::option::weighted(0.7, device())
}

fn inbox_op() -> impl Strategy<Value = Op> {
    let view = || prop::option::of(0..=GROUP);
    let slot = || 0..=2_u8;
    let seqs = prop::collection::vec(0..=20_u64, 0..4);
    prop_oneof![
        6 => prop::collection::vec(message(), 1..4).prop_map(Op::Enqueue),
        3 => group_send().prop_map(Op::SendToGroup),
        3 => (account(), reader(), view(), 0..=5_u32, 0..=600_usize, slot()).prop_map(
            |(inbox, device, view, messages, bytes, slot)| {
                Op::Lease { inbox, device, view, messages, bytes, slot }
            }
        ),
        2 => slot().prop_map(|slot| Op::Complete { slot }),
        1 => slot().prop_map(|slot| Op::Release { slot }),
        3 => (account(), reader(), view(), 0..=8_u64, 0..=8_u32).prop_map(
            |(inbox, device, view, after, messages)| {
                Op::Peek { inbox, device, view, after, messages }
            }
        ),
        2 => (account(), reader(), view(), prop::option::of(0..=20_u64), seqs).prop_map(
            |(inbox, device, view, up_to, seqs)| Op::Ack { inbox, device, view, up_to, seqs }
        ),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    (account(), account(), 0..=2_u8, message_id(), size(), 0..=20_u8).prop_map(
        |(from, to, channel, id, size, minutes)| Message { from, to, channel, id, size, minutes },
    )
}

fn group_send() -> impl Strategy<Value = GroupSend> {
    let listed = prop::option::of(prop::sample::subsequence(vec![1, 2, 3, 4, 11, 12], 0..=6));
    let ahead = prop::option::of(prop_oneof![4 => Just(0_u64), 1 => Just(1_u64)]);
    (account(), reader(), listed, message_id(), size(), 0..=20_u8, ahead).prop_map(
        |(from, device, to, id, size, minutes, ahead)| GroupSend {
            from,
            device,
            to,
            id,
            size,
            minutes,
            ahead,
        },
    )
}

fn message_id() -> impl Strategy<Value = Option<u8>> {
    prop::option::of(1..=5_u8)
}

fn size() -> impl Strategy<Value = usize> {
    // The large payloads may be stored once for several members.
    prop_oneof![3 => 0..=150_usize, 1 => 500..=700_usize]
}

fn key_op() -> impl Strategy<Value = Op> {
    let package = (1..=8_u8, prop::option::of(device()), any::<bool>(), 0..=20_u8)
        .prop_map(|(n, device, last_resort, minutes)| Package { n, device, last_resort, minutes });
    prop_oneof![
        3 => (account(), prop::option::of(device()), prop::collection::vec(package, 1..4))
            .prop_map(|(owner, device, packages)| Op::Upload { owner, device, packages }),
        2 => account().prop_map(|target| Op::Take { target }),
        2 => account().prop_map(|target| Op::TakeOfDevices { target }),
        1 => (account(), any::<u8>()).prop_map(|(owner, key)| Op::PutHybrid { owner, key }),
        1 => prop::collection::vec(account(), 0..4).prop_map(|targets| Op::GetHybrid { targets }),
    ]
}

fn session_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (1..=4_u8, account(), 0..=20_u8)
            .prop_map(|(token, owner, minutes)| Op::CreateSession { token, owner, minutes }),
        3 => (1..=4_u8).prop_map(|token| Op::FindSession { token }),
        1 => (1..=4_u8, 0..=20_u8).prop_map(|(token, minutes)| Op::Touch { token, minutes }),
        1 => (1..=4_u8).prop_map(|token| Op::Revoke { token }),
        1 => account().prop_map(|owner| Op::RevokeAll { owner }),
        2 => (account(), 1..=4_u8, 1..=2_u8)
            .prop_map(|(owner, token, record)| Op::ChangePassword { owner, token, record }),
    ]
}

fn account_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (account(), account(), 1..=2_u8)
            .prop_map(|(name, key, record)| Op::Register { name, key, record }),
        1 => account().prop_map(|key| Op::Find { key }),
        1 => Just(Op::Delete),
        1 => Just(Op::Erase),
        2 => (1..=3_u8, 1..=3_u8, 1..=20_u8)
            .prop_map(|(n, uses, minutes)| Op::CreateInvite { n, uses, minutes }),
        3 => (20..=25_u8, 20..=25_u8, 1..=3_u8)
            .prop_map(|(name, key, invite)| Op::RegisterInvited { name, key, invite }),
        1 => (1..=3_u8).prop_map(|n| Op::RevokeInvite { n }),
        1 => Just(Op::ListInvites),
    ]
}

fn block_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (account(), account()).prop_map(|(owner, blocked)| Op::Block { owner, blocked }),
        2 => (account(), account()).prop_map(|(owner, blocked)| Op::Unblock { owner, blocked }),
    ]
}

fn bundle_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (account(), 0..=4_u64, 1..=3_u8)
            .prop_map(|(owner, replaces, n)| Op::PutBundle { owner, replaces, n }),
        3 => account().prop_map(|owner| Op::FetchBundle { owner }),
        1 => account().prop_map(|owner| Op::RemoveBundle { owner }),
    ]
}

fn device_op() -> impl Strategy<Value = Op> {
    let key = prop::option::of(1..=OF_AN_ACCOUNT);
    prop_oneof![
        6 => (account(), device(), 1..=2_u8, key, 1..=4_u8).prop_map(
            |(owner, device, name, key, token)| {
                Op::RegisterDevice { owner, device, name, key, token }
            }
        ),
        3 => (account(), device())
            .prop_map(|(owner, device)| Op::RevokeDevice { owner, device }),
        2 => (account(), device())
            .prop_map(|(owner, device)| Op::ConfirmPosition { owner, device }),
        2 => account().prop_map(|owner| Op::ListDevices { owner }),
    ]
}

fn history(steps: usize, crashes: u32) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        40 => op().prop_map(Step::Do),
        5 => (1..=8_u8).prop_map(|minutes| Step::Advance { minutes }),
        crashes => Just(Step::Crash),
    ];
    prop::collection::vec(step, steps / 2..steps).prop_map(|steps| {
        let register = |n| Step::Do(Op::Register { name: n, key: n, record: 1 });
        let group = [Step::Do(Op::CreateGroup)];
        // Two devices, so that most histories have an inbox with two readers.
        let device = |device| {
            Step::Do(Op::RegisterDevice { owner: 1, device, name: 1, key: None, token: 1 })
        };
        let setup = MEMBERS.into_iter().map(register).chain(group).chain([1, 2].map(device));
        setup.chain(steps).collect()
    })
}

/// Executes the steps of a history.
trait Driver {
    fn apply(&mut self, op: &Op, now: UnixMillis) -> String;
    fn crash(&mut self);
}

fn compare(driver: &mut impl Driver, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    let mut now = START;
    for (index, step) in steps.into_iter().enumerate() {
        match step {
            Step::Do(op) => {
                let answer = driver.apply(&op, now);
                prop_assert_eq!(answer, model.apply(&op, now), "step {}: {:?}", index, op);
            }
            Step::Advance { minutes } => now = now.plus(MINUTE * minutes.into()),
            Step::Crash => {
                driver.crash();
                model.crash();
            }
        }
    }
    Ok(())
}

fn config(cases: u32) -> Config {
    Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() }
}

struct InProcess {
    runtime: tokio::runtime::Runtime,
    directory: tempfile::TempDir,
    running: Option<(Process, Machine)>,
}

impl InProcess {
    fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let directory = tempfile::tempdir().expect("a directory");
        let mut this = Self { runtime, directory, running: None };
        this.start();
        this
    }

    fn start(&mut self) {
        let process = self.runtime.block_on(Process::start(&self.directory, limits()));
        let machine = Machine::new(process.store.stores());
        self.running = Some((process, machine));
    }
}

impl Driver for InProcess {
    fn apply(&mut self, op: &Op, now: UnixMillis) -> String {
        let (_, machine) = self.running.as_mut().expect("running");
        self.runtime.block_on(machine.apply(op.clone(), now))
    }

    fn crash(&mut self) {
        let (process, machine) = self.running.take().expect("running");
        self.runtime.block_on(process.crash());
        // Dropped after the crash, so that the crash ends the leases.
        drop(machine);
        self.start();
    }
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn the_store_answers_as_the_model_when_its_runtime_is_lost(steps in history(120, 2)) {
        compare(&mut InProcess::new(), steps)?;
    }
}

struct Killed {
    directory: tempfile::TempDir,
    child: Child,
}

impl Killed {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut child = Child::spawn();
        child.open(directory.path(), limits()).expect("a new directory");
        Self { directory, child }
    }
}

impl Driver for Killed {
    fn apply(&mut self, op: &Op, now: UnixMillis) -> String {
        self.child.apply(op, now)
    }

    fn crash(&mut self) {
        self.child.kill();
        self.child = Child::spawn();
        self.child.open(self.directory.path(), limits()).expect("a directory of a killed process");
    }
}

proptest! {
    #![proptest_config(config(8))]

    #[test]
    fn the_store_answers_as_the_model_when_its_process_is_killed(steps in history(100, 3)) {
        compare(&mut Killed::new(), steps)?;
    }
}
