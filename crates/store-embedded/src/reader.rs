//! Readers of inboxes, as the store distinguishes them.

use qpq_domain::IdentityKey;

/// The number of a registration of a device, which is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RegistrationNumber(pub(crate) i64);

/// A reader of an inbox. A device that is registered again is another reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InboxReader {
    pub(crate) inbox: IdentityKey,
    /// `None` for the single reader of an inbox without devices.
    pub(crate) registration: Option<RegistrationNumber>,
}
