//! The erasure of deleted accounts, as a job.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_jobs::{Completion, Failure, Policy, Work};
use qpq_ports::{Accounts, ERASE, Erasing, ErasureId, Job, JobKind};

/// Maximum number of batches in one run. The next run, which is due immediately, continues.
const BATCHES: usize = 1_000;

/// Erases the data of a deleted account, in batches, so that no other work waits long.
///
/// The erasure looks at everything again after all calls that began before the deletion have
/// ended. So the job runs at least twice.
pub(crate) struct Erase {
    pub(crate) accounts: Arc<dyn Accounts>,
}

#[async_trait]
impl Work for Erase {
    fn kind(&self) -> JobKind {
        ERASE
    }

    fn policy(&self) -> Policy {
        Policy {
            concurrency: 1,
            lease: Duration::from_secs(15),
            // An account that was promised to be erased is erased in the end.
            max_attempts: None,
            backoff_cap: Duration::from_secs(5 * 60),
            ..Policy::default()
        }
    }

    async fn run(&self, job: &Job, now: UnixMillis) -> Result<Completion, Failure> {
        let Some(erasure) = ErasureId::of_job(&job.payload) else {
            return Err(Failure::Permanent("the payload is not the id of an erasure".into()));
        };
        for _ in 0..BATCHES {
            let erased = self.accounts.erase(erasure, now).await;
            match erased.map_err(|error| Failure::temporary(&error))? {
                Erasing::More => tokio::task::yield_now().await,
                Erasing::WaitFor(wait) => return Ok(Completion::RepeatAfter(wait)),
                Erasing::Done => {
                    tracing::info!("a deleted account was erased");
                    return Ok(Completion::Done);
                }
            }
        }
        Ok(Completion::RepeatAfter(Duration::ZERO))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use qpq_domain::{AccountId, IdentityKey, Username};
    use qpq_ports::{
        Account, Claim, Credentials, Deletion, JobId, NewAccount, PasswordChange, PasswordChanged,
        Registration, StoreError, StoreResult,
    };
    use tokio::sync::Mutex;

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    /// Returns the results of batches in order, and then a failure.
    struct Batches(Mutex<VecDeque<Erasing>>);

    #[async_trait]
    impl Accounts for Batches {
        async fn register(&self, _: NewAccount) -> StoreResult<Registration> {
            unreachable!("an erasure registers no account")
        }

        async fn credentials(&self, _: &Username) -> StoreResult<Option<Credentials>> {
            unreachable!("an erasure reads no account")
        }

        async fn change_password(&self, _: PasswordChange) -> StoreResult<PasswordChanged> {
            unreachable!("an erasure changes no password")
        }

        async fn by_username(&self, _: &Username) -> StoreResult<Option<Account>> {
            unreachable!("an erasure reads no account")
        }

        async fn by_identity(&self, _: &IdentityKey) -> StoreResult<Option<Account>> {
            unreachable!("an erasure reads no account")
        }

        async fn delete(&self, _: AccountId, _: UnixMillis) -> StoreResult<Deletion> {
            unreachable!("an erasure follows a deletion")
        }

        async fn erase(&self, _: ErasureId, _: UnixMillis) -> StoreResult<Erasing> {
            let next = self.0.lock().await.pop_front();
            next.ok_or_else(|| StoreError::unavailable(std::io::Error::other("disk full")))
        }
    }

    async fn run(batches: Vec<Erasing>, payload: &[u8]) -> Result<Completion, Failure> {
        let accounts = Arc::new(Batches(Mutex::new(batches.into())));
        let claim = Claim { job: JobId(1), token: [0; 16] };
        let job = Job { claim, payload: payload.to_vec(), attempt: 1 };
        Erase { accounts }.run(&job, NOW).await
    }

    #[tokio::test]
    async fn batches_follow_each_other_until_the_erasure_waits_or_is_done() {
        const WAIT: Duration = Duration::from_secs(180);
        let waiting = vec![Erasing::More, Erasing::More, Erasing::WaitFor(WAIT)];
        assert_eq!(run(waiting, &[7; 16]).await, Ok(Completion::RepeatAfter(WAIT)));
        let done = vec![Erasing::More, Erasing::Done];
        assert_eq!(run(done, &[7; 16]).await, Ok(Completion::Done));
        let long = vec![Erasing::More; BATCHES + 1];
        assert_eq!(run(long, &[7; 16]).await, Ok(Completion::RepeatAfter(Duration::ZERO)));
    }

    #[tokio::test]
    async fn a_failed_batch_is_retried_and_a_malformed_payload_is_not() {
        let Err(Failure::Temporary(error)) = run(vec![Erasing::More], &[7; 16]).await else {
            panic!("a temporary failure")
        };
        assert!(error.contains("disk full"), "{error}");
        assert!(matches!(run(vec![], &[7; 15]).await, Err(Failure::Permanent(_))));
    }
}
