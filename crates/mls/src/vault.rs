//! One encrypted file with a client's secrets. Its key is derived from the account's password and
//! from the OPAQUE export key, which only a login with the password yields.
//!
//! Layout: `"QPQV"` · version (1 byte, 1) · salt (16) · nonce (24) · XChaCha20-Poly1305 of the
//! content, with all that precedes the nonce as associated data. A file is replaced whole or not at
//! all.

use std::{fmt, fs, io, path::Path};

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use hkdf::Hkdf;
use rand::{RngCore as _, rngs::OsRng};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const MAGIC: &[u8; 4] = b"QPQV";
const VERSION: u8 = 1;
const HEADER_LEN: usize = MAGIC.len() + 1 + SALT_LEN;
const SALT_LEN: usize = 16;
const NONCE_LEN: usize = 24;

/// The parameters of Argon2id that OWASP recommends, and that the OPAQUE library uses by default:
/// 19 MiB, 2 passes, 1 lane.
const ARGON2_MEMORY_KIB: u32 = 19 * 1024;
const ARGON2_PASSES: u32 = 2;

/// The salt of a vault, stored in the file, unencrypted. The same password yields a different key
/// in each vault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Salt([u8; SALT_LEN]);

impl Salt {
    pub fn random() -> Self {
        let mut salt = [0; SALT_LEN];
        OsRng.fill_bytes(&mut salt);
        Self(salt)
    }
}

/// The key of one vault, with the salt from which it was derived.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct VaultKey {
    key: [u8; 32],
    #[zeroize(skip)]
    salt: Salt,
}

impl VaultKey {
    /// Derives a key: HKDF-SHA-256 of Argon2id(password, salt) ‖ `export_key`, the 64 bytes that an
    /// OPAQUE login yields.
    ///
    /// The derivation takes some 30 ms of one core and 19 MiB. An attacker with the file needs the
    /// server's help for each guess at the password. An attacker who also has the server's record
    /// needs this much work for each.
    pub fn derive(password: &[u8], export_key: &[u8; 64], salt: Salt) -> Self {
        let params = Params::new(ARGON2_MEMORY_KIB, ARGON2_PASSES, 1, Some(32))
            .expect("the parameters are valid");
        let mut input = Zeroizing::new([0; 32 + 64]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(password, &salt.0, &mut input[..32])
            .expect("the lengths are valid");
        input[32..].copy_from_slice(export_key);
        let mut key = [0; 32];
        Hkdf::<Sha256>::new(Some(&salt.0), &*input)
            .expand(b"qpq/vault/1", &mut key)
            .expect("32 bytes are not too long");
        Self { key, salt }
    }

    /// Restores a key that was kept elsewhere, such as in the system's keyring, from the output of
    /// [`VaultKey::to_bytes`].
    pub fn from_bytes(bytes: &[u8; 48]) -> Self {
        let (mut key, mut salt) = ([0; 32], [0; SALT_LEN]);
        key.copy_from_slice(&bytes[..32]);
        salt.copy_from_slice(&bytes[32..]);
        Self { key, salt: Salt(salt) }
    }

    /// Returns key and salt, to be kept as secret as the vault's content.
    pub fn to_bytes(&self) -> Zeroizing<[u8; 48]> {
        let mut bytes = Zeroizing::new([0; 48]);
        bytes[..32].copy_from_slice(&self.key);
        bytes[32..].copy_from_slice(&self.salt.0);
        bytes
    }

    fn header(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(MAGIC);
        header[4] = VERSION;
        header[5..].copy_from_slice(&self.salt.0);
        header
    }
}

impl fmt::Debug for VaultKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VaultKey(redacted)")
    }
}

/// The error of reading or writing a vault.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("{0} (check that the directory exists, is yours and has space)")]
    Io(#[from] io::Error),
    #[error("the file is not a vault, or was cut short")]
    NotAVault,
    #[error("the vault was written by a newer version: update this client")]
    Newer,
    #[error("the vault does not open: the password is wrong, or the file is damaged")]
    WrongKeyOrDamaged,
}

/// Encrypts `content`.
pub fn seal(key: &VaultKey, content: &[u8]) -> Vec<u8> {
    let header = key.header();
    let mut nonce = [0; NONCE_LEN];
    OsRng.fill_bytes(&mut nonce);
    let sealed = XChaCha20Poly1305::new((&key.key).into())
        .encrypt(XNonce::from_slice(&nonce), Payload { msg: content, aad: &header })
        .expect("no content comes near XChaCha20's limit of 256 GiB");
    [&header[..], &nonce, &sealed].concat()
}

/// Decrypts the output of [`seal`].
pub fn open(key: &VaultKey, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    salt_of(sealed)?;
    let (header, rest) = sealed.split_at(HEADER_LEN);
    let (nonce, ciphertext) = rest.split_at_checked(NONCE_LEN).ok_or(VaultError::NotAVault)?;
    XChaCha20Poly1305::new((&key.key).into())
        .decrypt(XNonce::from_slice(nonce), Payload { msg: ciphertext, aad: header })
        .map(Zeroizing::new)
        .map_err(|_| VaultError::WrongKeyOrDamaged)
}

/// Returns the salt of sealed bytes, from which their key is derived.
pub fn salt_of(sealed: &[u8]) -> Result<Salt, VaultError> {
    let header = sealed.get(..HEADER_LEN).ok_or(VaultError::NotAVault)?;
    match (&header[..4] == MAGIC, header[4]) {
        (false, _) | (true, 0) => Err(VaultError::NotAVault),
        (true, VERSION) => {
            let mut salt = [0; SALT_LEN];
            salt.copy_from_slice(&header[5..]);
            Ok(Salt(salt))
        }
        (true, _) => Err(VaultError::Newer),
    }
}

/// Returns the salt of the vault at `path`; `None` if there is no file.
pub fn read_salt(path: &Path) -> Result<Option<Salt>, VaultError> {
    read_file(path)?.map(|sealed| salt_of(&sealed)).transpose()
}

/// Returns the content of the vault at `path`; `None` if there is no file.
pub fn read(path: &Path, key: &VaultKey) -> Result<Option<Zeroizing<Vec<u8>>>, VaultError> {
    read_file(path)?.map(|sealed| open(key, &sealed)).transpose()
}

/// Replaces the vault at `path`. Only one process at a time may write a vault.
///
/// When this function returns, the new content is on the disk. After an error or a crash, the old
/// content is intact.
pub fn write(path: &Path, key: &VaultKey, content: &[u8]) -> Result<(), VaultError> {
    Ok(qpq_durable_file::replace(path, &seal(key, content), 0o600)?)
}

fn read_file(path: &Path) -> Result<Option<Vec<u8>>, VaultError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn key(byte: u8) -> VaultKey {
        VaultKey::from_bytes(&[byte; 48])
    }

    #[test]
    fn written_content_is_read_and_the_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert!(read(&path, &key(1)).unwrap().is_none());
        assert!(read_salt(&path).unwrap().is_none());
        write(&path, &key(1), b"first").unwrap();
        write(&path, &key(1), b"second").unwrap();
        assert_eq!(&**read(&path, &key(1)).unwrap().unwrap(), b"second");
        assert_eq!(read_salt(&path).unwrap(), Some(key(1).salt));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no other file is left");
    }

    #[test]
    fn a_failed_write_keeps_the_old_content_and_a_file_left_by_a_crash_is_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        write(&path, &key(1), b"old").unwrap();
        // Left by a crash of an earlier release, between writing and renaming.
        fs::write(directory.path().join("state.new"), b"half").unwrap();
        write(&path, &key(1), b"new").unwrap();
        assert_eq!(&**read(&path, &key(1)).unwrap().unwrap(), b"new");
        let directory_in_place = directory.path().join("directory");
        fs::create_dir(&directory_in_place).unwrap();
        assert!(matches!(write(&directory_in_place, &key(1), b"newer"), Err(VaultError::Io(_))));
        assert!(directory_in_place.is_dir());
        assert_eq!(&**read(&path, &key(1)).unwrap().unwrap(), b"new");
    }

    #[test]
    fn another_key_a_changed_byte_and_a_missing_end_are_refused() {
        let sealed = seal(&key(1), b"content");
        assert_eq!(&**open(&key(1), &sealed).unwrap(), b"content");
        assert!(matches!(open(&key(2), &sealed), Err(VaultError::WrongKeyOrDamaged)));
        for position in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[position] ^= 1;
            let error = open(&key(1), &damaged).expect_err("damaged");
            match position {
                0..4 => assert!(matches!(error, VaultError::NotAVault)),
                4 => assert!(matches!(error, VaultError::NotAVault), "version 1 becomes 0"),
                _ => assert!(matches!(error, VaultError::WrongKeyOrDamaged), "at {position}"),
            }
            assert!(open(&key(1), &sealed[..position]).is_err(), "cut at {position}");
        }
        let mut newer = sealed.clone();
        newer[4] = 2;
        assert!(matches!(open(&key(1), &newer), Err(VaultError::Newer)));
        let longer = [&sealed[..], &[0]].concat();
        assert!(matches!(open(&key(1), &longer), Err(VaultError::WrongKeyOrDamaged)));
    }

    #[test]
    fn sealing_the_same_content_twice_yields_different_bytes() {
        assert_ne!(seal(&key(1), b"content"), seal(&key(1), b"content"));
    }

    #[test]
    fn the_key_depends_on_password_export_key_and_salt() {
        let (salt, other_salt) = (Salt([1; 16]), Salt([2; 16]));
        let derived = VaultKey::derive(b"password", &[3; 64], salt);
        assert_eq!(derived.to_bytes(), VaultKey::derive(b"password", &[3; 64], salt).to_bytes());
        for other in [
            VaultKey::derive(b"passwore", &[3; 64], salt),
            VaultKey::derive(b"password", &[4; 64], salt),
            VaultKey::derive(b"password", &[3; 64], other_salt),
        ] {
            assert_ne!(derived.key, other.key);
        }
        assert_eq!(VaultKey::from_bytes(&derived.to_bytes()).to_bytes(), derived.to_bytes());
    }

    #[test]
    fn debug_output_redacts_the_vault_key() {
        assert_eq!(format!("{:?}", key(0xab)), "VaultKey(redacted)");
    }
}
