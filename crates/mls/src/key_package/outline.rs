//! Reads the fields of a KeyPackage (RFC 9420 §10) that do not depend on its ciphersuite. The
//! server judges these fields even if it cannot check a signature.
//!
//! Reading is strict: lengths are minimal, nothing is missing, and nothing is left over.

use super::Rejected;

const MLS_1_0: u16 = 1;
const WIRE_FORMAT_KEY_PACKAGE: u16 = 5;
const LEAF_SOURCE_KEY_PACKAGE: u8 = 1;
const EXTENSION_LAST_RESORT: u16 = 0x000A;

/// The fields of a KeyPackage that do not depend on its suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outline<'a> {
    /// The KeyPackage without the MLSMessage around it.
    pub(super) bare: &'a [u8],
    pub(super) suite: u16,
    pub(super) signature_key: &'a [u8],
    /// Unix seconds.
    pub(super) not_before: u64,
    /// Unix seconds.
    pub(super) not_after: u64,
    pub(super) last_resort: bool,
}

impl<'a> Outline<'a> {
    /// Reads a bare KeyPackage or one inside an MLSMessage.
    ///
    /// Both begin with the version. An MLSMessage continues with the wire format, a bare KeyPackage
    /// with the suite, and 5 is a value of both. The bytes are read as an MLSMessage first: those
    /// of a wrapped package could be a bare one only with an empty init key.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Rejected> {
        let mut cursor = Cursor(bytes);
        if cursor.u16()? != MLS_1_0 {
            return Err(Rejected::WrongVersion);
        }
        if cursor.u16()? == WIRE_FORMAT_KEY_PACKAGE
            && let Ok(outline) = Self::read_bare(cursor.0)
        {
            return Ok(outline);
        }
        Self::read_bare(bytes)
    }

    fn read_bare(bare: &'a [u8]) -> Result<Self, Rejected> {
        let mut cursor = Cursor(bare);
        if cursor.u16()? != MLS_1_0 {
            return Err(Rejected::WrongVersion);
        }
        let suite = cursor.u16()?;
        let _init_key = cursor.vector()?;
        let _encryption_key = cursor.vector()?;
        let signature_key = cursor.vector()?;
        let _credential_type = cursor.u16()?;
        let _credential = cursor.vector()?;
        // Versions, ciphersuites, extensions, proposals, credentials.
        for _capability in 0..5 {
            cursor.vector()?;
        }
        if cursor.u8()? != LEAF_SOURCE_KEY_PACKAGE {
            return Err(Rejected::Malformed);
        }
        let not_before = cursor.u64()?;
        let not_after = cursor.u64()?;
        let _leaf_extensions = cursor.extensions()?;
        let _leaf_signature = cursor.vector()?;
        let last_resort = cursor.extensions()?;
        let _signature = cursor.vector()?;
        if !cursor.0.is_empty() {
            return Err(Rejected::Malformed);
        }
        Ok(Self { bare, suite, signature_key, not_before, not_after, last_resort })
    }
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Rejected> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Rejected::Malformed)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Rejected> {
        self.take(N)?.try_into().map_err(|_| Rejected::Malformed)
    }

    fn u8(&mut self) -> Result<u8, Rejected> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Rejected> {
        self.array().map(u16::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Rejected> {
        self.array().map(u64::from_be_bytes)
    }

    /// Reads a vector. Its length takes 1, 2 or 4 bytes (RFC 9420 §2.1.2), and must be in the
    /// shortest form.
    fn vector(&mut self) -> Result<&'a [u8], Rejected> {
        let first = self.u8()?;
        let low = usize::from(first & 0x3f);
        let (len, least) = match first >> 6 {
            0 => (low, 0),
            1 => (low << 8 | usize::from(self.u8()?), 1 << 6),
            2 => {
                let [a, b, c] = self.array()?;
                (low << 24 | usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c), 1 << 14)
            }
            _ => return Err(Rejected::Malformed),
        };
        if len < least {
            return Err(Rejected::Malformed);
        }
        self.take(len)
    }

    /// Reads a vector of extensions; returns whether the last-resort one is among them.
    fn extensions(&mut self) -> Result<bool, Rejected> {
        let mut inner = Cursor(self.vector()?);
        let mut last_resort = false;
        while !inner.0.is_empty() {
            last_resort |= inner.u16()? == EXTENSION_LAST_RESORT;
            inner.vector()?;
        }
        Ok(last_resort)
    }
}
