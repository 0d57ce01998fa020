//! Tests of the check: packages of openmls, packages signed by hand, and other bytes.

use ed25519_dalek::{Signer as _, SigningKey};
use openmls::prelude::{
    Capabilities, Extension, ExtensionType, Extensions, KeyPackage as MlsKeyPackage, Lifetime,
    MlsMessageOut, UnknownExtension,
};
use proptest::prelude::*;
use qpq_domain::Username;
use tls_codec::Serialize as _;

use super::*;
use crate::{Identity, leaf::LeafSigner, packages, store::Store};

/// A day in 2001. For openmls, which reads the system's clock, every lifetime around this day is
/// over.
const NOW: UnixMillis = UnixMillis(1_000_000_000_000);
const SECOND: Duration = Duration::from_secs(1);

fn identity() -> Identity {
    Identity::from_seed(&[7; 32])
}

/// Returns the keys that may sign: the key of the only identity of these tests.
fn own() -> [[u8; 32]; 1] {
    [*identity().public().as_bytes()]
}

fn judge(bytes: &[u8]) -> Result<Checked, Rejected> {
    check(bytes, &Policy::default(), &own(), NOW)
}

struct Recipe {
    lifetime: Lifetime,
    extensions: Extensions<MlsKeyPackage>,
    capabilities: Capabilities,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            lifetime: packages::lifetime(NOW),
            extensions: Extensions::empty(),
            capabilities: packages::capabilities(),
        }
    }
}

impl Recipe {
    fn living(from: UnixMillis, to: UnixMillis) -> Self {
        Self { lifetime: Lifetime::init(from.0 / 1000, to.0 / 1000), ..Self::default() }
    }

    fn make(self) -> MlsKeyPackage {
        let name = Username::parse("ann").unwrap();
        let (store, leaf) = (Store::default(), LeafSigner::of_account(&identity(), &name));
        MlsKeyPackage::builder()
            .key_package_lifetime(self.lifetime)
            .key_package_extensions(self.extensions)
            .leaf_node_capabilities(self.capabilities)
            .build(packages::SUITE, &store, &leaf, leaf.credential())
            .unwrap()
            .key_package()
            .clone()
    }

    fn bytes(self) -> Vec<u8> {
        self.make().tls_serialize_detached().unwrap()
    }
}

fn wrap(bare: &[u8]) -> Vec<u8> {
    [&[0, 1, 0, 5], bare].concat()
}

fn with_suite(mut bare: Vec<u8>, suite: u16) -> Vec<u8> {
    bare[2..4].copy_from_slice(&suite.to_be_bytes());
    bare
}

#[test]
fn a_good_package_is_accepted_bare_and_wrapped() {
    let package = Recipe::default().make();
    let bare = package.tls_serialize_detached().unwrap();
    let checked = judge(&bare).unwrap();
    let expected = package.hash_ref(&RustCrypto::default()).unwrap();
    assert_eq!(checked.reference, expected.as_slice());
    assert!(checked.verified);
    assert!(!checked.last_resort);
    assert_eq!(checked.not_after, NOW.plus(84 * 24 * 3600 * SECOND));

    let wrapped = MlsMessageOut::from(package).to_bytes().unwrap();
    assert_eq!(wrapped, wrap(&bare));
    assert_eq!(judge(&wrapped), Ok(checked));
}

#[test]
fn a_last_resort_package_is_recognized() {
    let extensions = Extensions::single(Extension::LastResort(Default::default())).unwrap();
    let checked = judge(&Recipe { extensions, ..Recipe::default() }.bytes()).unwrap();
    assert!(checked.last_resort);
}

/// Packages are checked at [`NOW`], in 2001. By the system's clock, openmls finds their lifetimes
/// wrong, and must have checked everything else before.
#[test]
fn a_bad_signature_is_found_at_any_time_of_the_systems_clock() {
    let good = Recipe::default().bytes();
    assert!(judge(&good).unwrap().verified);
    let mut bad = good;
    *bad.last_mut().unwrap() ^= 1;
    assert_eq!(judge(&bad), Err(Rejected::BadSignature));

    let extensions = Extensions::single(Extension::LastResort(Default::default())).unwrap();
    let capabilities = Capabilities::new(None, Some(&[packages::SUITE]), None, None, None);
    let unlisted = Recipe { extensions, capabilities, ..Recipe::default() };
    assert_eq!(
        judge(&unlisted.bytes()),
        Err(Rejected::Inconsistent),
        "an extension that the leaf denies"
    );
}

#[test]
fn any_flipped_bit_is_found() {
    let good = Recipe::default().bytes();
    for position in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[position / 8] ^= 1 << (position % 8);
        let verdict = judge(&bad);
        assert!(verdict.is_err(), "bit {position}: {verdict:?}");
    }
}

#[test]
fn truncated_and_extended_packages_are_malformed() {
    let good = Recipe::default().bytes();
    for form in [good.clone(), wrap(&good)] {
        for len in 0..form.len() {
            assert_eq!(judge(&form[..len]), Err(Rejected::Malformed), "cut to {len}");
        }
        let longer = [&form[..], &[0]].concat();
        assert_eq!(judge(&longer), Err(Rejected::Malformed));
    }
    assert_eq!(judge(&wrap(&wrap(&good))), Err(Rejected::Malformed), "wrapped twice");
}

#[test]
fn lifetimes_are_judged_at_the_given_time() {
    let day = 24 * 3600 * SECOND;
    for (from, to, verdict) in [
        (NOW.minus(day), NOW, Err(Rejected::Expired)),
        (NOW.minus(day), NOW.plus(SECOND), Ok(())),
        (NOW, NOW.plus(day), Ok(())),
        (NOW.plus(SECOND), NOW.plus(day), Err(Rejected::NotYetValid)),
        (NOW.minus(3600 * SECOND), NOW.plus(84 * day), Ok(())),
        (NOW.minus(3601 * SECOND), NOW.plus(84 * day), Err(Rejected::LifetimeTooLong)),
        (NOW.minus(day), NOW.plus(3650 * day), Err(Rejected::LifetimeTooLong)),
        (UnixMillis(0), UnixMillis(u64::MAX), Err(Rejected::LifetimeTooLong)),
        (UnixMillis(u64::MAX), UnixMillis(u64::MAX), Err(Rejected::NotYetValid)),
    ] {
        let bytes = Recipe::living(from, to).bytes();
        assert_eq!(judge(&bytes).map(drop), verdict, "{from:?} to {to:?}");
        let unchecked = with_suite(bytes, 0x004D);
        assert_eq!(
            judge(&unchecked).map(drop),
            verdict,
            "the same where signatures are not checked"
        );
    }
}

#[test]
fn another_owners_package_is_refused() {
    let other = Identity::from_seed(&[8; 32]).public();
    let verdict = check(&Recipe::default().bytes(), &Policy::default(), &[*other.as_bytes()], NOW);
    assert_eq!(verdict, Err(Rejected::ForeignSigner));
}

#[test]
fn a_package_of_any_of_the_owners_keys_is_accepted_and_names_the_key() {
    let other = *Identity::from_seed(&[8; 32]).public().as_bytes();
    let [own] = own();
    for signers in [[own, other], [other, own]] {
        let checked = check(&Recipe::default().bytes(), &Policy::default(), &signers, NOW);
        assert_eq!(checked.map(|checked| checked.signature_key), Ok(Some(own)));
    }
}

#[test]
fn size_version_and_suite_are_limited() {
    assert_eq!(judge(&vec![0; 64 * 1024 + 1]), Err(Rejected::TooLarge));
    assert_eq!(judge(&vec![0; 64 * 1024]), Err(Rejected::WrongVersion));
    let good = Recipe::default().bytes();
    let mut newer = good.clone();
    newer[1] = 2;
    assert_eq!(judge(&newer), Err(Rejected::WrongVersion));
    assert_eq!(judge(&wrap(&newer)), Err(Rejected::Malformed), "read as a bare package of suite 5");
    for suite in [0, 2, 4, 5, 6, 7, 0xffff] {
        assert_eq!(
            judge(&with_suite(good.clone(), suite)),
            Err(Rejected::SuiteNotAllowed),
            "{suite}"
        );
    }
}

/// Suites 4 to 6 are known to openmls but not to its provider, the post-quantum ones to neither.
#[test]
fn packages_of_a_suite_that_cannot_be_checked_are_accepted_unverified() {
    let policy = Policy { suites: vec![1, 4, 5, 6, 0x004D, 0xF123], ..Policy::default() };
    for suite in [4, 5, 6, 0x004D, 0xF123] {
        let bare = with_suite(Recipe::default().bytes(), suite);
        for form in [bare.clone(), wrap(&bare)] {
            let checked = check(&form, &policy, &own(), NOW).unwrap();
            assert!(!checked.verified, "{suite}");
            assert_eq!(checked.not_after, NOW.plus(84 * 24 * 3600 * SECOND));
        }
    }
}

/// For a suite that openmls does not parse, only the outline refuses a second encoding of a
/// package.
#[test]
fn a_non_canonical_encoding_of_an_unchecked_package_is_malformed() {
    let good = with_suite(Recipe::default().bytes(), 0x004D);
    assert!(judge(&good).is_ok());
    for len in 0..good.len() {
        assert_eq!(judge(&good[..len]), Err(Rejected::Malformed), "cut to {len}");
    }
    assert_eq!(judge(&[&good[..], &[0]].concat()), Err(Rejected::Malformed));
    // The init key's length, 32, in two and in four bytes.
    assert_eq!(good[4], 32);
    for longer in [&[0x40, 32][..], &[0x80, 0, 0, 32]] {
        let padded = [&good[..4], longer, &good[5..]].concat();
        assert_eq!(judge(&padded), Err(Rejected::Malformed));
    }
}

/// Older clients put a hybrid init key of 1216 bytes into packages of suite 1.
#[test]
fn init_keys_may_have_any_length() {
    for len in [0, 1, 63, 64, 1216, 16_384] {
        let bare = signed_by_hand(&vec![9; len]);
        let checked = judge(&bare).unwrap_or_else(|reason| panic!("{len}: {reason}"));
        assert!(checked.verified);
        assert!(judge(&wrap(&bare)).unwrap().verified);
    }
}

#[test]
fn unknown_extensions_are_allowed_where_the_leaf_lists_them() {
    let number = 0xF0F1;
    let extensions =
        Extensions::single(Extension::Unknown(number, UnknownExtension(vec![1]))).unwrap();
    let listed = Capabilities::new(
        None,
        Some(&[packages::SUITE]),
        Some(&[ExtensionType::Unknown(number)]),
        None,
        None,
    );
    let recipe = Recipe { extensions, capabilities: listed, ..Recipe::default() };
    assert!(judge(&recipe.bytes()).unwrap().verified);
}

/// A package of suite 1 written field by field (RFC 9420 §10) and signed with Ed25519 over RFC
/// 9420's SignWithLabel content.
fn signed_by_hand(init_key: &[u8]) -> Vec<u8> {
    let key = SigningKey::from_bytes(&[7; 32]);
    let vector = |content: &[u8]| [&length(content.len())[..], content].concat();
    let sign = |label: &str, content: &[u8]| {
        let labelled = [vector(format!("MLS 1.0 {label}").as_bytes()), vector(content)].concat();
        vector(&key.sign(&labelled).to_bytes())
    };
    let leaf = [
        vector(&[5; 32]),                            // encryption_key
        vector(key.verifying_key().as_bytes()),      // signature_key
        [&[0, 1], &vector(b"ann")[..]].concat(),     // basic credential
        vector(&[0, 1]),                             // versions
        vector(&[0, 1]),                             // ciphersuites
        vector(&[]),                                 // extensions
        vector(&[]),                                 // proposals
        vector(&[0, 1]),                             // credentials
        vec![1],                                     // leaf_node_source: key_package
        (NOW.0 / 1000 - 60).to_be_bytes().to_vec(),  // not_before
        (NOW.0 / 1000 + 600).to_be_bytes().to_vec(), // not_after
        vector(&[]),                                 // extensions
    ]
    .concat();
    let leaf = [&leaf[..], &sign("LeafNodeTBS", &leaf)].concat();
    let package = [&[0, 1, 0, 1], &vector(init_key)[..], &leaf, &vector(&[])].concat();
    [&package[..], &sign("KeyPackageTBS", &package)].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes_are_refused_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        prop_assert!(judge(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_after_the_beginning_of_a_package_are_never_verified(
        tail in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let everything = Policy { suites: (0..=0x50).collect(), ..Policy::default() };
        let prefixes = [
            &[0, 1, 0, 1][..],
            &[0, 1, 0, 0x4D],
            &[0, 1, 0, 5, 0, 1, 0, 1],
            &[0, 1, 0, 5, 0, 1, 0, 4],
        ];
        for prefix in prefixes {
            let bytes = [prefix, &tail].concat();
            if let Ok(checked) = check(&bytes, &everything, &own(), NOW) {
                prop_assert!(!checked.verified);
            }
        }
    }

    #[test]
    fn edited_packages_are_not_verified(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        insert in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let good = signed_by_hand(&[9; 32]);
        let mut bad = good.clone();
        for (position, byte) in edits {
            let position = position.index(bad.len());
            bad[position] = byte;
        }
        let at = cut.index(bad.len());
        bad.splice(at..at, insert);
        prop_assume!(bad != good);
        for form in [bad.clone(), wrap(&bad)] {
            let verdict = judge(&form);
            let is_verified = verdict.as_ref().is_ok_and(|checked| checked.verified);
            prop_assert!(!is_verified, "{:?}", verdict);
        }
    }
}
