//! Tells calls that wait, and subscriptions, that a session of their account may have ended: a parked FetchWait must not
//! outlive its session by more than a moment. Whoever is told looks the session up again ([`crate::auth::recheck`]).

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use qpq_domain::AccountId;
use tokio::sync::watch;

/// Who waits, by account. Entries live as long as somebody watches.
#[derive(Debug, Default)]
pub(crate) struct Revocations {
    accounts: Arc<Mutex<HashMap<AccountId, Weak<Account>>>>,
}

#[derive(Debug)]
struct Account {
    id: AccountId,
    ended: watch::Sender<()>,
    accounts: Arc<Mutex<HashMap<AccountId, Weak<Account>>>>,
}

/// A watch on one account's sessions.
#[derive(Debug)]
pub(crate) struct Watch {
    ended: watch::Receiver<()>,
    _account: Arc<Account>,
}

impl Revocations {
    /// Begins to watch. What ends before this call is not told: look the session up after it.
    pub(crate) fn watch(&self, id: AccountId) -> Watch {
        let mut accounts = self.accounts.lock();
        let account = accounts.get(&id).and_then(Weak::upgrade).unwrap_or_else(|| {
            let account = Account { id, ended: watch::Sender::new(()), accounts: Arc::clone(&self.accounts) };
            let account = Arc::new(account);
            accounts.insert(id, Arc::downgrade(&account));
            account
        });
        Watch { ended: account.ended.subscribe(), _account: account }
    }

    /// Tells everyone who watches the account.
    pub(crate) fn announce(&self, id: AccountId) {
        let account = self.accounts.lock().get(&id).and_then(Weak::upgrade);
        if let Some(account) = account {
            account.ended.send_replace(());
        }
    }
}

impl Watch {
    /// Completes once a session of the account ended since the watch began or this completed last.
    pub(crate) async fn ended(&mut self) {
        self.ended.changed().await.expect("the account, and so the sender, lives as long as its watches");
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut accounts = self.accounts.lock();
        // Another watch may have begun in between: its entry stays.
        if accounts.get(&self.id).is_some_and(|account| account.strong_count() == 0) {
            accounts.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::FutureExt;

    use super::*;

    #[test]
    fn only_the_account_that_ended_a_session_is_told() {
        let revocations = Revocations::default();
        let (mut alice, mut bob) = (revocations.watch(AccountId(1)), revocations.watch(AccountId(2)));
        let mut again = revocations.watch(AccountId(1));
        revocations.announce(AccountId(1));
        assert_eq!(alice.ended().now_or_never(), Some(()));
        assert_eq!(again.ended().now_or_never(), Some(()));
        assert_eq!(alice.ended().now_or_never(), None);
        assert_eq!(bob.ended().now_or_never(), None);
    }

    #[test]
    fn nothing_is_kept_for_who_does_not_watch() {
        let revocations = Revocations::default();
        drop((revocations.watch(AccountId(1)), revocations.watch(AccountId(1))));
        revocations.announce(AccountId(1));
        assert!(revocations.accounts.lock().is_empty());
    }
}
