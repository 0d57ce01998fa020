//! Reports: messages for the administrators, which the server cannot read.

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use sha2::{Digest as _, Sha256};

use crate::StoreResult;

/// Stores reports.
#[async_trait]
pub trait Reports: Send + Sync {
    /// Stores a report. A repeat by the same account is stored once.
    async fn report(&self, report: NewReport) -> StoreResult<Reporting>;

    /// Returns a page of the reports, newest first. Records the read in the audit trail
    /// ([`Audit`](crate::Audit)) in the same step.
    async fn read(&self, read: ReadReports) -> StoreResult<Vec<Report>>;
}

/// A report to be stored.
#[derive(Clone, Debug)]
pub struct NewReport {
    /// The account that reports.
    pub reporter: AccountId,
    /// The conversation that the report is about, in the reporter's own format.
    pub conversation: Bytes,
    /// The ciphertext.
    pub encrypted_report: Bytes,
    /// The instant of the call.
    pub now: UnixMillis,
}

impl NewReport {
    /// Returns the hash by which a repeat is recognised.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update((self.conversation.len() as u64).to_be_bytes());
        hash.update(&self.conversation);
        hash.update(&self.encrypted_report);
        hash.finalize().into()
    }
}

/// The outcome of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reporting {
    /// The report is stored.
    Stored,
    /// The account has made the same report before, and it is still stored.
    Repeated,
    /// The account has [`qpq_domain::ReportLimits::max_per_account`] stored reports.
    Full,
}

/// A read of reports by an administrator.
#[derive(Clone, Copy, Debug)]
pub struct ReadReports {
    /// The identity key of the administrator.
    pub reader: IdentityKey,
    /// The number of newer reports to skip.
    pub offset: u32,
    /// Maximum reports.
    pub limit: u32,
    /// Maximum sum of [`Report::cost`]. The first report is always returned.
    pub bytes: u32,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// A stored report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The number of the report. A later report has a greater one.
    pub id: u64,
    /// The identity key of the account that reported.
    pub reporter: IdentityKey,
    /// The conversation, in the reporter's own format.
    pub conversation: Bytes,
    /// The ciphertext.
    pub encrypted_report: Bytes,
    /// The time of the report.
    pub reported_at: UnixMillis,
}

impl Report {
    /// The maximum size of a report in a response without its ciphertext, in bytes.
    pub const FRAMING: u32 = 160;

    /// Returns the maximum size of the report in a response.
    pub fn cost(&self) -> usize {
        self.encrypted_report.len() + Self::FRAMING as usize
    }
}
