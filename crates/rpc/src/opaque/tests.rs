//! OPAQUE with the RFC's test vectors on both sides, and with messages of hostile clients.

use opaque_ke::ksf::Identity;
use rand::rngs::OsRng;

use super::{
    vectors::{common, fake_1, real_1, real_2},
    *,
};

const CONTEXT: &[u8] = b"OPAQUE-POC";

/// [`QpqSuite`] with the key stretching of the test vectors.
struct VectorSuite;

impl CipherSuite for VectorSuite {
    type OprfCs = <QpqSuite as CipherSuite>::OprfCs;
    type KeyExchange = <QpqSuite as CipherSuite>::KeyExchange;
    type Ksf = Identity;
}

/// A random number generator that returns fixed bytes and panics at their end.
struct Script(Vec<u8>);

impl Script {
    fn new(parts: &[&str]) -> Self {
        Self(parts.iter().flat_map(|part| unhex(part)).collect())
    }

    /// Returns the bytes from which the library creates a blinding scalar: twice its length, little
    /// endian.
    fn blind(scalar: &str) -> Vec<u8> {
        [unhex(scalar), vec![0; 32]].concat()
    }
}

impl RngCore for Script {
    fn next_u32(&mut self) -> u32 {
        unreachable!("only whole arrays are drawn")
    }

    fn next_u64(&mut self) -> u64 {
        unreachable!("only whole arrays are drawn")
    }

    fn fill_bytes(&mut self, dest: &mut [u8]) {
        dest.copy_from_slice(&self.0[..dest.len()]);
        self.0.drain(..dest.len());
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand::Error> {
        self.fill_bytes(dest);
        Ok(())
    }
}

impl CryptoRng for Script {}

fn unhex(text: &str) -> Vec<u8> {
    hex::decode(text).expect("hexadecimal")
}

fn user() -> Username {
    Username::parse("1234").expect("a plain name")
}

fn server(seed: &str, private_key: &str, public_key_of_nobody: &str) -> OpaqueServer {
    let setup = [seed, private_key, public_key_of_nobody].map(unhex).concat();
    OpaqueServer::parse(&setup).expect("a setup")
}

fn parameters(identifiers: Identifiers<'static>) -> ServerLoginParameters<'static, 'static> {
    ServerLoginParameters { context: Some(CONTEXT), identifiers }
}

/// The part of a test vector in which C.1.1 and C.1.2 differ.
struct Real {
    identifiers: Identifiers<'static>,
    upload: &'static str,
    ke2: &'static str,
    ke3: &'static str,
    session_key: &'static str,
}

/// Runs a registration and a login between this server and the library's client, and compares every
/// message with `vector`.
fn play(vector: &Real) {
    let server = server(common::OPRF_SEED, common::SERVER_PRIVATE_KEY, common::SERVER_PUBLIC_KEY);
    let password = unhex(common::PASSWORD);
    assert_eq!(password, b"CorrectHorseBatteryStaple");

    let mut rng = Script(Script::blind(common::BLIND_REGISTRATION));
    let client = ClientRegistration::<VectorSuite>::start(&mut rng, &password).expect("a request");
    let request = client.message.serialize();
    assert_eq!(hex::encode(request), common::REGISTRATION_REQUEST);
    let response = server.start_registration(&user(), &request).expect("a response");
    assert_eq!(hex::encode(&response), common::REGISTRATION_RESPONSE);
    let registered = client
        .state
        .finish(
            &mut Script::new(&[common::ENVELOPE_NONCE]),
            &password,
            RegistrationResponse::deserialize(&response).expect("64 bytes"),
            ClientRegistrationFinishParameters::new(vector.identifiers, None),
        )
        .expect("an upload");
    let upload = registered.message.serialize();
    assert_eq!(hex::encode(upload), vector.upload);
    assert_eq!(hex::encode(registered.export_key), common::EXPORT_KEY);
    let record = server.finish_registration(&upload).expect("a record");
    assert_eq!(hex::encode(&record), vector.upload);

    let mut rng = Script(Script::blind(common::BLIND_LOGIN));
    rng.0.extend(Script::new(&[common::CLIENT_KEYSHARE_SEED, common::CLIENT_NONCE]).0);
    let client = ClientLogin::<VectorSuite>::start(&mut rng, &password).expect("KE1");
    let ke1 = client.message.serialize();
    assert_eq!(hex::encode(ke1), common::KE1);
    let unused = "00".repeat(64);
    let mut rng = Script::new(&[
        &unused,
        common::MASKING_NONCE,
        common::SERVER_KEYSHARE_SEED,
        common::SERVER_NONCE,
    ]);
    let (ke2, pending) = server
        .start_login_in(parameters(vector.identifiers), &mut rng, &user(), Some(&record), &ke1)
        .expect("KE2");
    assert_eq!(hex::encode(&ke2), vector.ke2);
    let logged_in = client
        .state
        .finish(
            &mut Script(Vec::new()),
            &password,
            CredentialResponse::deserialize(&ke2).expect("320 bytes"),
            ClientLoginFinishParameters::new(Some(CONTEXT), vector.identifiers, None),
        )
        .expect("KE3");
    let ke3 = logged_in.message.serialize();
    assert_eq!(hex::encode(ke3), vector.ke3);
    assert_eq!(hex::encode(logged_in.session_key), vector.session_key);
    assert_eq!(hex::encode(logged_in.export_key), common::EXPORT_KEY);
    let session_key =
        pending.finish_in(parameters(vector.identifiers), &ke3).expect("the right password");
    assert_eq!(hex::encode(&*session_key), vector.session_key);
}

#[test]
fn the_vector_c_1_1_of_rfc_9807_is_reproduced() {
    play(&Real {
        identifiers: Identifiers::default(),
        upload: real_1::REGISTRATION_UPLOAD,
        ke2: real_1::KE2,
        ke3: real_1::KE3,
        session_key: real_1::SESSION_KEY,
    });
}

#[test]
fn the_vector_c_1_2_of_rfc_9807_is_reproduced() {
    play(&Real {
        identifiers: Identifiers { client: Some(b"alice"), server: Some(b"bob") },
        upload: real_2::REGISTRATION_UPLOAD,
        ke2: real_2::KE2,
        ke3: real_2::KE3,
        session_key: real_2::SESSION_KEY,
    });
}

#[test]
fn the_vector_c_2_1_of_rfc_9807_for_an_unknown_user_is_reproduced() {
    let server = server(fake_1::OPRF_SEED, fake_1::SERVER_PRIVATE_KEY, fake_1::CLIENT_PUBLIC_KEY);
    let mut rng = Script::new(&[
        fake_1::MASKING_KEY,
        fake_1::MASKING_NONCE,
        fake_1::SERVER_KEYSHARE_SEED,
        fake_1::SERVER_NONCE,
    ]);
    let identifiers = Identifiers { client: Some(b"alice"), server: Some(b"bob") };
    let (ke2, pending) = server
        .start_login_in(parameters(identifiers), &mut rng, &user(), None, &unhex(fake_1::KE1))
        .expect("KE2");
    assert_eq!(hex::encode(ke2), fake_1::KE2);
    assert!(rng.0.is_empty());
    assert_eq!(pending.finish(&[7; len::KE3]), Err(OpaqueError::WrongPassword));
}

fn ke1() -> Vec<u8> {
    let started = ClientLogin::<VectorSuite>::start(&mut OsRng, b"password").expect("KE1");
    started.message.serialize().to_vec()
}

#[test]
fn known_and_unknown_users_consume_equal_randomness_and_have_equal_lengths() {
    let server = OpaqueServer::generate(&mut OsRng);
    let mut known = Script(vec![9; 1024]);
    let mut unknown = Script(vec![9; 1024]);
    let ke1 = ke1();
    let record = unhex(real_1::REGISTRATION_UPLOAD);
    let (real, _) = server.start_login(&mut known, &user(), Some(&record), &ke1).expect("KE2");
    let (fake, _) = server.start_login(&mut unknown, &user(), None, &ke1).expect("KE2");
    assert_eq!((real.len(), fake.len()), (len::KE2, len::KE2));
    assert_eq!(known.0.len(), unknown.0.len());
    // The OPRF's output depends on the name alone, so a repeated start reveals nothing either.
    assert_eq!(real[..32], fake[..32]);
    assert_eq!(server.dummy_record.len(), record.len());
}

#[test]
fn a_byte_more_or_less_is_refused() {
    let server = OpaqueServer::generate(&mut OsRng);
    let record = unhex(real_1::REGISTRATION_UPLOAD);
    let request = unhex(common::REGISTRATION_REQUEST);
    let ke1 = ke1();
    let changed = |bytes: &[u8]| {
        [&bytes[1..], &[]]
            .into_iter()
            .map(<[u8]>::to_vec)
            .chain([[bytes, &[0]].concat()])
            .collect::<Vec<_>>()
    };
    for request in changed(&request) {
        assert_eq!(server.start_registration(&user(), &request), Err(OpaqueError::Malformed));
    }
    for upload in changed(&record) {
        assert_eq!(server.finish_registration(&upload), Err(OpaqueError::Malformed));
    }
    for ke1 in changed(&ke1) {
        let refused =
            server.start_login(&mut OsRng, &user(), Some(&record), &ke1).expect_err("length");
        assert_eq!(refused, OpaqueError::Malformed);
    }
    for ke3 in changed(&[0; len::KE3]) {
        let (_, pending) = server.start_login(&mut OsRng, &user(), None, &ke1).expect("KE2");
        assert_eq!(pending.finish(&ke3), Err(OpaqueError::Malformed));
    }
    for record in changed(&record) {
        let refused =
            server.start_login(&mut OsRng, &user(), Some(&record), &ke1).expect_err("length");
        assert_eq!(refused, OpaqueError::CorruptRecord);
    }
}

#[test]
fn the_identity_element_is_refused_in_place_of_every_point() {
    let server = OpaqueServer::generate(&mut OsRng);
    let identity = [0; 32];
    assert_eq!(server.start_registration(&user(), &identity), Err(OpaqueError::Malformed));
    let mut upload = unhex(real_1::REGISTRATION_UPLOAD);
    upload[..32].copy_from_slice(&identity);
    assert_eq!(server.finish_registration(&upload), Err(OpaqueError::Malformed));
    // KE1: blinded element 32 ‖ nonce 32 ‖ key share 32.
    for point in [0..32, 64..96] {
        let mut ke1 = ke1();
        ke1[point].copy_from_slice(&identity);
        let refused = server.start_login(&mut OsRng, &user(), None, &ke1).expect_err("no point");
        assert_eq!(refused, OpaqueError::Malformed);
    }
}

#[test]
fn a_setup_is_stored_completely_and_a_damaged_one_is_refused() {
    let server = OpaqueServer::generate(&mut OsRng);
    let stored = server.serialize();
    assert_eq!(stored.len(), len::SETUP);
    let again = OpaqueServer::parse(&stored).expect("what was stored");
    assert_eq!(again.serialize(), stored);
    again.self_check(&mut OsRng).expect("a login");
    assert_eq!(OpaqueServer::parse(&stored[1..]).expect_err("short"), InvalidSetup::Length);
    assert_eq!(
        OpaqueServer::parse(&[&stored[..], &[0]].concat()).expect_err("long"),
        InvalidSetup::Length
    );
    for part in [64..96, 96..128] {
        let mut damaged = stored.clone();
        damaged[part].fill(0xff);
        assert_eq!(OpaqueServer::parse(&damaged).expect_err("no key"), InvalidSetup::Key);
    }
}

#[test]
fn debug_output_redacts_secrets() {
    let server = OpaqueServer::generate(&mut OsRng);
    let (_, pending) = server.start_login(&mut OsRng, &user(), None, &ke1()).expect("KE2");
    assert_eq!(format!("{server:?} {pending:?}"), "OpaqueServer(redacted) PendingLogin(redacted)");
}
