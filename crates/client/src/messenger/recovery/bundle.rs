//! The recovery bundle: the content of an account, sealed twice over.
//!
//! | bytes | content |
//! |---|---|
//! | 4 | `QPQR` |
//! | 1 | 1: this format |
//! | 93 | the content key, sealed under the export slot's key |
//! | 93 | the content key, sealed under the code slot's key |
//! | rest | the content, sealed under the content key |
//!
//! The three parts are sealed as a vault ([`qpq_mls::vault`]) whose salt is zero. The keys of the
//! slots are HKDF-SHA-256, without salt, of the OPAQUE export key (64 bytes) and of the recovery
//! code (16 bytes), with `info` = `qpq/recovery-export/1` or `qpq/recovery-code/1` ‖ the account's
//! identity key. The content key is `info` = `qpq/recovery-content/1` ‖ identity key of 32 random
//! bytes, which are what the slots contain. So no part of a bundle opens as that of another
//! account.
//!
//! The content is a protobuf message: field 1 the account's content in the form of a grant without
//! statement and MAC, field 2 the key of the code slot, with which a restored device seals later
//! bundles.

use hkdf::Hkdf;
use prost::Message as _;
use qpq_domain::IdentityKey;
use qpq_mls::vault::{self, VaultKey};
use rand::{RngCore as _, rngs::OsRng};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::code::RecoveryCode;
use crate::{
    messenger::{link::AccountContent, records::Corrupt},
    secret::ExportKey,
};

const MAGIC: &[u8] = b"QPQR\x01";
const SLOT_LEN: usize = 93;
/// The maximum length of the account's content. A bundle has at most 64 KiB.
const MAX_ACCOUNT: usize = 64 * 1024 - 1024;

/// The key of a slot.
pub(super) type SlotKey = Zeroizing<[u8; 32]>;

/// The keys of both slots.
#[derive(Clone)]
pub(super) struct BundleKeys {
    pub(super) export: SlotKey,
    pub(super) code: SlotKey,
}

/// An opened bundle.
pub(super) struct Opened {
    pub(super) account: AccountContent,
    pub(super) code: SlotKey,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Content {
    #[prost(bytes = "vec", tag = "1")]
    account: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    code_key: Vec<u8>,
}

impl Drop for Content {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.account);
        zeroize::Zeroize::zeroize(&mut self.code_key);
    }
}

/// Returns the key of the export slot.
pub(super) fn export_slot(identity: &IdentityKey, export_key: &ExportKey) -> SlotKey {
    derive(export_key.expose(), b"qpq/recovery-export/1", identity)
}

/// Returns the key of the code slot.
pub(super) fn code_slot(identity: &IdentityKey, code: &RecoveryCode) -> SlotKey {
    derive(code.expose(), b"qpq/recovery-code/1", identity)
}

fn derive(secret: &[u8], label: &[u8], identity: &IdentityKey) -> SlotKey {
    let mut key = Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(None, secret)
        .expand_multi_info(&[label, identity.as_bytes()], &mut *key)
        .expect("32 bytes are not too long");
    key
}

/// Encodes the account's content for a bundle. Equal accounts have equal encodings.
pub(super) fn encode(mut account: AccountContent, code: &SlotKey) -> Zeroizing<Vec<u8>> {
    account.conversations.sort_by_key(|conversation| conversation.channel);
    account.people.sort_by_key(|person| person.identity);
    let account = account.encode(MAX_ACCOUNT).to_vec();
    let content = Content { account, code_key: code.to_vec() };
    Zeroizing::new(content.encode_to_vec())
}

/// Seals encoded content.
pub(super) fn seal(identity: &IdentityKey, keys: &BundleKeys, content: &[u8]) -> Vec<u8> {
    let mut secret = Zeroizing::new([0; 32]);
    OsRng.fill_bytes(&mut *secret);
    let export = vault::seal(&vault_key(&keys.export), &secret[..]);
    let code = vault::seal(&vault_key(&keys.code), &secret[..]);
    let sealed = vault::seal(&content_key(&secret[..], identity), content);
    [MAGIC, &export, &code, &sealed].concat()
}

/// Opens a bundle with the first of the given keys that fits. Returns `None` if none does.
pub(super) fn open(
    identity: &IdentityKey,
    export: Option<&SlotKey>,
    code: Option<&SlotKey>,
    bundle: &[u8],
) -> Option<Opened> {
    let rest = bundle.strip_prefix(MAGIC)?;
    let (export_slot, rest) = rest.split_at_checked(SLOT_LEN)?;
    let (code_slot, sealed) = rest.split_at_checked(SLOT_LEN)?;
    let slots = [(export, export_slot), (code, code_slot)];
    let secret =
        slots.into_iter().find_map(|(key, slot)| vault::open(&vault_key(key?), slot).ok())?;
    let content = vault::open(&content_key(&secret, identity), sealed).ok()?;
    let opened = read(&content).ok()?;
    (opened.account.identity.public() == *identity).then_some(opened)
}

fn read(content: &[u8]) -> Result<Opened, Corrupt> {
    let content = Content::decode(content).map_err(Corrupt::new)?;
    let code = Zeroizing::new(content.code_key[..].try_into().map_err(Corrupt::new)?);
    Ok(Opened { account: AccountContent::decode(&content.account)?, code })
}

fn content_key(secret: &[u8], identity: &IdentityKey) -> VaultKey {
    vault_key(&derive(secret, b"qpq/recovery-content/1", identity))
}

fn vault_key(key: &SlotKey) -> VaultKey {
    let mut bytes = Zeroizing::new([0; 48]);
    bytes[..32].copy_from_slice(&key[..]);
    VaultKey::from_bytes(&bytes)
}

#[cfg(test)]
mod tests {
    use qpq_domain::ChannelId;
    use qpq_mls::Identity;

    use super::*;
    use crate::messenger::link::GrantedConversation;

    fn account(conversations: u32) -> AccountContent {
        let channel = |n: u32| {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            ChannelId::new(bytes)
        };
        let conversation = |n| GrantedConversation {
            channel: channel(n),
            members: vec![IdentityKey::new([7; 32]); 3],
        };
        AccountContent {
            identity: Identity::from_seed(&[4; 32]),
            conversations: (0..conversations).map(conversation).collect(),
            people: Vec::new(),
            blocked: vec![IdentityKey::new([8; 32])],
        }
    }

    fn export_key(byte: u8) -> ExportKey {
        ExportKey::new(Zeroizing::new([byte; ExportKey::LEN]))
    }

    #[test]
    fn either_key_opens_a_bundle_and_no_other_does() {
        let identity = account(0).identity.public();
        let code = RecoveryCode::random();
        let export = export_slot(&identity, &export_key(1));
        let keys = BundleKeys { export: export.clone(), code: code_slot(&identity, &code) };
        let bundle = seal(&identity, &keys, &encode(account(3), &keys.code));
        let other = export_slot(&identity, &export_key(2));
        let wrong_code = code_slot(&identity, &RecoveryCode::random());
        for (export, code, opens) in [
            (Some(&keys.export), None, true),
            (None, Some(&keys.code), true),
            (Some(&other), Some(&keys.code), true),
            (Some(&keys.export), Some(&wrong_code), true),
            (Some(&other), Some(&wrong_code), false),
            (None, Some(&keys.export), false),
            (Some(&keys.code), None, false),
            (None, None, false),
        ] {
            let opened = open(&identity, export, code, &bundle);
            assert_eq!(opened.is_some(), opens);
            if let Some(opened) = opened {
                assert_eq!(opened.account.conversations, account(3).conversations);
                assert_eq!(opened.account.blocked, account(3).blocked);
                assert_eq!(opened.account.identity.seed(), account(0).identity.seed());
                assert_eq!(opened.code, keys.code);
            }
        }
        let another = IdentityKey::new([9; 32]);
        assert!(open(&another, Some(&keys.export), None, &bundle).is_none());
        for position in (0..bundle.len()).step_by(7) {
            let mut damaged = bundle.clone();
            damaged[position] ^= 1;
            let slot = (5..5 + SLOT_LEN).contains(&position);
            let opened = open(&identity, Some(&keys.export), None, &damaged);
            // The slot of the code is not read.
            let unread = (5 + SLOT_LEN..5 + 2 * SLOT_LEN).contains(&position);
            assert_eq!(opened.is_some(), unread && !slot, "byte {position}");
        }
    }

    #[test]
    fn equal_accounts_have_equal_encodings_and_a_large_one_fits() {
        let code = Zeroizing::new([5; 32]);
        let mut turned = account(5);
        turned.conversations.reverse();
        assert_eq!(encode(account(5), &code), encode(turned, &code));
        let identity = account(0).identity.public();
        let keys = BundleKeys { export: Zeroizing::new([6; 32]), code };
        let bundle = seal(&identity, &keys, &encode(account(20_000), &keys.code));
        assert!(bundle.len() <= 64 * 1024, "{}", bundle.len());
        let opened = open(&identity, Some(&keys.export), None, &bundle).unwrap();
        assert!(opened.account.conversations.len() > 500);
    }
}
