//! Rules of [`crate::Maintenance`].

use qpq_domain::{DeliveryLimits, KeyPackageLimits, TokenHash, UnixMillis};

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount, all, message, seqs, texts},
};
use crate::{
    Batch, Enqueued, NewKeyPackage, NewSession, PackageOwner, Session, Upload, UploadMode,
};

pub async fn a_healthy_backend_passes_its_check(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    bench.stores.maintenance.check().await.expect("healthy");
    bench.crash().await;
    bench.stores.maintenance.check().await.expect("healthy again");
}

/// Sweeps until nothing is left to remove; returns the number of rows.
pub(super) async fn sweep_all(bench: &Bench, now: UnixMillis) -> u64 {
    let mut rows = 0;
    loop {
        match bench.stores.maintenance.sweep(now).await.expect("sweep").rows {
            0 => return rows,
            some => rows += some,
        }
    }
}

pub(super) async fn open(
    bench: &Bench,
    n: u8,
    owner: RegisteredAccount,
    expires_at: UnixMillis,
) -> TokenHash {
    let token = TokenHash::new([n; 32]);
    let session = Session {
        account: owner.account,
        identity: owner.identity,
        device: None,
        authenticated_at: NOW,
        last_used_at: NOW,
        expires_at,
    };
    bench.stores.sessions.create(NewSession { token, session }).await.expect("create");
    token
}

pub(super) fn package(n: u8, not_after: UnixMillis) -> NewKeyPackage {
    NewKeyPackage {
        fingerprint: [n; 32],
        bytes: vec![n],
        device: None,
        last_resort: false,
        not_before: UnixMillis(0),
        not_after,
    }
}

pub async fn a_sweep_removes_what_has_expired_and_nothing_else(factory: &dyn Factory) {
    const MANY: usize = 600;
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let brief = vec![message(alice, alice, "brief").living(MINUTE); MANY];
    bench.stores.inboxes.enqueue(Batch::new(brief)).await.expect("enqueue");
    bench.deliver(message(alice, alice, "lasting")).await;
    let (expired, alive) = (
        open(&bench, 1, alice, NOW.plus(MINUTE)).await,
        open(&bench, 2, alice, NOW.plus(9 * MINUTE)).await,
    );
    bench.stores.sessions.find(&expired).await.expect("find");
    let packages = vec![package(1, NOW.plus(MINUTE)), package(2, NOW.plus(9 * MINUTE))];
    let keys = &bench.stores.key_packages;
    let upload = keys
        .upload(PackageOwner::account(alice.account), packages, UploadMode::Add, NOW)
        .await
        .expect("upload");
    assert!(matches!(upload, Upload::Stored(_)));

    assert_eq!(sweep_all(&bench, NOW).await, 0);
    assert_eq!(sweep_all(&bench, NOW.plus(2 * MINUTE)).await, MANY as u64 + 2);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [MANY as u64 + 1]);
    assert!(bench.stores.sessions.find(&expired).await.expect("find").is_none());
    assert!(bench.stores.sessions.find(&alive).await.expect("find").is_some());
    let taken = bench
        .stores
        .key_packages
        .take(&alice.identity, NOW)
        .await
        .expect("take")
        .expect("one is left");
    assert_eq!(taken.bytes, [2]);
}

pub async fn a_sweep_changes_no_answer(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let expiring = message(alice, alice, "expiring").with_id(1).living(MINUTE);
    let first = bench.deliver(expiring.clone()).await;
    let acked = bench.deliver(message(alice, alice, "acked").with_id(2)).await;
    bench.ack(all(alice), None, &[2]).await;
    for minutes in [2, 10, 14] {
        let now = NOW.plus(minutes * MINUTE);
        sweep_all(&bench, now).await;
        assert_eq!(bench.send(expiring.clone().at(now)).await, Enqueued::Duplicate(first));
        assert_eq!(
            bench.send(message(alice, alice, "acked").with_id(2).at(now)).await,
            Enqueued::Duplicate(acked)
        );
    }
    let now = NOW.plus(15 * MINUTE);
    sweep_all(&bench, now).await;
    assert_eq!(
        bench.send(expiring.clone().at(now)).await,
        Enqueued::Duplicate(first),
        "for one minute more"
    );
    assert_eq!(bench.deliver(message(alice, alice, "acked").with_id(2).at(now)).await.seq.0, 3);
    let now = NOW.plus(16 * MINUTE);
    assert!(sweep_all(&bench, now).await > 0, "the id of what expired is forgotten");
    assert_eq!(bench.deliver(expiring.at(now)).await.seq.0, 4);
}

/// The inbox has more expired messages than one transaction removes, so some of them are left when
/// a message arrives.
pub async fn an_inbox_full_of_expired_messages_accepts_new_ones(factory: &dyn Factory) {
    const MANY: u64 = 600;
    let delivery =
        DeliveryLimits { max_messages: MANY, sender_share: 1, ..DeliveryLimits::default() };
    let bench = Bench::with(factory, delivery, KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    let mut brief = vec![message(alice, alice, "brief").living(MINUTE); 599];
    brief.push(message(alice, alice, "last").with_id(1).living(MINUTE));
    bench.stores.inboxes.enqueue(Batch::new(brief)).await.expect("enqueue");
    assert_eq!(bench.send(message(alice, alice, "full")).await, Enqueued::QueueFull);

    // The id of the last message is forgotten by then, so another message may use it.
    let now = NOW.plus(60 * MINUTE);
    let mut fresh = vec![message(alice, alice, "last").with_id(1).at(now)];
    fresh.extend(vec![message(alice, alice, "fresh").at(now); 600]);
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(fresh)).await.expect("enqueue");
    let accepted = outcomes.iter().take_while(|o| matches!(o, Enqueued::Accepted(_))).count();
    assert_eq!(accepted, 600, "as many as an empty inbox holds");
    assert_eq!(outcomes[600], Enqueued::QueueFull);
    sweep_all(&bench, now).await;
    let page = bench.peek_at(all(alice), now).await;
    assert_eq!(page.envelopes.len(), 600);
    assert_eq!(texts(&page)[..2], ["last", "fresh"]);
}
