//! The secrets that pass through a client's hands: wiped from memory when dropped, never shown.

use std::fmt;

use zeroize::Zeroizing;

/// A password, as typed. It never leaves the machine.
#[derive(Clone)]
pub struct Password(Zeroizing<String>);

impl Password {
    /// Takes the string over, so that no copy stays behind.
    pub fn new(password: Zeroizing<String>) -> Self {
        Self(password)
    }

    pub(crate) fn expose(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl From<String> for Password {
    fn from(password: String) -> Self {
        Self(Zeroizing::new(password))
    }
}

impl From<&str> for Password {
    fn from(password: &str) -> Self {
        Self::from(password.to_owned())
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(redacted)")
    }
}

/// What OPAQUE gives the client and never the server: 64 bytes that depend on the password and on
/// the server's record (RFC 9807 §3), the same at registration and at every login. The profile's
/// encryption key comes from it.
#[derive(Clone)]
pub struct ExportKey(Zeroizing<[u8; Self::LEN]>);

impl ExportKey {
    pub const LEN: usize = 64;

    pub(crate) fn new(bytes: Zeroizing<[u8; Self::LEN]>) -> Self {
        Self(bytes)
    }

    pub fn expose(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for ExportKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExportKey(redacted)")
    }
}
