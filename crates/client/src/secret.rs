//! The secrets that a client processes. They are wiped from memory when dropped, and never shown.

use std::fmt;

use precis_core::profile::PrecisFastInvocation as _;
use precis_profiles::OpaqueString;
use zeroize::Zeroizing;

/// A password, as typed. A password never leaves the machine.
///
/// The same password has several encodings: a keyboard may send `ä` as one character or as two. So
/// a registration uses the form of RFC 8265 §4.2 (OpaqueString), and a login tries that form first.
/// Accounts that are older than this rule were registered with the password as typed, which a login
/// tries second.
#[derive(Clone)]
pub struct Password(Zeroizing<String>);

impl Password {
    /// Creates a password from a string, which is not copied.
    pub fn new(password: Zeroizing<String>) -> Self {
        Self(password)
    }

    /// Returns the form to register with, or `None` if RFC 8265 does not allow the password: it is
    /// empty or has a control character.
    pub(crate) fn prepared(&self) -> Option<Self> {
        let prepared = OpaqueString::enforce(self.0.as_str()).ok()?.into_owned();
        Some(Self(Zeroizing::new(prepared)))
    }

    /// Returns the forms to log in with, in the order in which to try them.
    pub(crate) fn forms(&self) -> Vec<Self> {
        let mut forms: Vec<Self> = self.prepared().into_iter().collect();
        if forms.iter().all(|form| form.0 != self.0) {
            forms.push(self.clone());
        }
        forms
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

/// The OPAQUE export key, which the client computes and the server never sees: 64 bytes that depend
/// on the password and on the server's record (RFC 9807 §3), the same at registration and at every
/// login. The profile's encryption key is derived from these bytes.
#[derive(Clone)]
pub struct ExportKey(Zeroizing<[u8; Self::LEN]>);

impl ExportKey {
    /// The number of bytes.
    pub const LEN: usize = 64;

    pub(crate) fn new(bytes: Zeroizing<[u8; Self::LEN]>) -> Self {
        Self(bytes)
    }

    /// Returns the bytes.
    pub fn expose(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for ExportKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExportKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forms(typed: &str) -> Vec<String> {
        let forms = Password::from(typed).forms();
        forms.iter().map(|form| form.0.to_string()).collect()
    }

    #[test]
    fn a_login_tries_the_prepared_form_and_then_the_typed_one() {
        assert_eq!(forms("correct horse"), ["correct horse"]);
        assert_eq!(forms("p\u{e4}ss"), ["p\u{e4}ss"]);
        assert_eq!(forms("pa\u{308}ss"), ["p\u{e4}ss", "pa\u{308}ss"]);
        assert_eq!(forms("a\u{a0}b"), ["a b", "a\u{a0}b"]);
        // Neither case nor width is changed.
        assert_eq!(forms("Ａb"), ["Ａb"]);
        assert_eq!(forms("a\tb"), ["a\tb"]);
        assert!(Password::from("a\tb").prepared().is_none());
    }
}
