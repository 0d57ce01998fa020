//! The server's part of OPAQUE-3DH (RFC 9807): registration and login without revealing the
//! password to the server.
//!
//! [`OpaqueServer`] owns the deployment's long-term secrets and is the only code that uses
//! `opaque-ke`. The exact length of every message is checked first, because the library's parsers
//! accept trailing bytes. The work for an unknown username is the same as for a known one (RFC 9807
//! §6.3.2.2).

use std::fmt;

use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialFinalization, CredentialRequest,
    CredentialResponse, Identifiers, RegistrationRequest, RegistrationResponse, RegistrationUpload,
    Ristretto255, ServerLogin, ServerLoginParameters, ServerRegistration, ServerSetup, TripleDh,
    errors::ProtocolError,
};
use qpq_domain::Username;
use rand::{CryptoRng, RngCore};
use sha2::Sha512;
use zeroize::{Zeroize as _, Zeroizing};

/// The lengths of the messages in bytes (RFC 9807 §5.1 and §6.1 with this suite).
pub mod len {
    /// RegistrationRequest.
    pub const REGISTRATION_REQUEST: usize = 32;
    /// RegistrationResponse.
    pub const REGISTRATION_RESPONSE: usize = 64;
    /// RegistrationRecord: the client's upload, which is stored unchanged.
    pub const RECORD: usize = 192;
    /// The client's first message of a login.
    pub const KE1: usize = 96;
    /// The server's message of a login.
    pub const KE2: usize = 320;
    /// The client's second message of a login.
    pub const KE3: usize = 64;
    /// OPRF seed 64 ‖ server private key 32 ‖ public key for unknown usernames 32.
    pub const SETUP: usize = 128;
}

/// The suite: ristretto255-SHA512, HKDF- and HMAC-SHA-512, 3DH over ristretto255. Only clients use
/// the key stretching function; the library's type requires one.
#[derive(Debug)]
pub struct QpqSuite;

impl CipherSuite for QpqSuite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, Sha512>;
    type Ksf = argon2::Argon2<'static>;
}

/// The reason why an OPAQUE message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpaqueError {
    /// The message has a wrong length or does not parse.
    #[error("not a well-formed OPAQUE message")]
    Malformed,
    /// The password is wrong, or the username is unknown.
    #[error("wrong password")]
    WrongPassword,
    /// The stored record is damaged.
    #[error("a stored OPAQUE record does not parse")]
    CorruptRecord,
}

/// The reason why OPAQUE secrets cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSetup {
    /// The length is wrong.
    #[error("the OPAQUE setup must be exactly 128 bytes; restore the file from a backup")]
    Length,
    /// A key is invalid.
    #[error("the OPAQUE setup contains no valid key; restore the file from a backup")]
    Key,
    /// A login with the secrets fails.
    #[error("a login with the OPAQUE setup failed its self-check; restore the file from a backup")]
    SelfCheck,
}

/// The server's state between OpaqueLoginStart and OpaqueLoginFinish. An attacker could log in with
/// this state, so it stays in memory and is wiped when dropped.
pub struct PendingLogin(Box<ServerLogin<QpqSuite>>);

impl fmt::Debug for PendingLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PendingLogin(redacted)")
    }
}

/// The deployment's OPAQUE secrets, the same on all edges. They must never change: with other
/// secrets no password works.
pub struct OpaqueServer {
    setup: ServerSetup<QpqSuite>,
    /// A valid record of no account, which is parsed for unknown usernames, as the stored one is
    /// for a known username.
    dummy_record: [u8; len::RECORD],
}

impl fmt::Debug for OpaqueServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpaqueServer(redacted)")
    }
}

impl OpaqueServer {
    /// Generates new secrets. Accounts that were registered with other secrets cannot log in with
    /// these.
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self::new(ServerSetup::new(rng))
    }

    /// Parses and checks secrets from [`OpaqueServer::serialize`].
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidSetup> {
        if bytes.len() != len::SETUP {
            return Err(InvalidSetup::Length);
        }
        ServerSetup::deserialize(bytes).map(Self::new).map_err(|_| InvalidSetup::Key)
    }

    /// Serializes the secrets, to be stored readable by the server's user alone.
    pub fn serialize(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = self.setup.serialize();
        let copy = Zeroizing::new(bytes.to_vec());
        bytes.as_mut_slice().zeroize();
        copy
    }

    fn new(setup: ServerSetup<QpqSuite>) -> Self {
        let mut dummy_record = [0; len::RECORD];
        // client_public_key 32 ‖ masking_key 64 ‖ envelope 96: with any valid point, the record is
        // valid.
        dummy_record[..32].copy_from_slice(&setup.keypair().public().serialize());
        Self { setup, dummy_record }
    }

    /// Returns RegistrationResponse, 64 bytes. Depends only on the username and the request.
    pub fn start_registration(
        &self,
        username: &Username,
        request: &[u8],
    ) -> Result<Vec<u8>, OpaqueError> {
        exact(request, len::REGISTRATION_REQUEST)?;
        let request = RegistrationRequest::deserialize(request).map_err(malformed)?;
        let started =
            ServerRegistration::<QpqSuite>::start(&self.setup, request, credential_id(username))
                .map_err(malformed)?;
        Ok(started.message.serialize().to_vec())
    }

    /// Returns the record to store, 192 bytes: the checked upload.
    pub fn finish_registration(&self, upload: &[u8]) -> Result<Vec<u8>, OpaqueError> {
        exact(upload, len::RECORD)?;
        let upload = RegistrationUpload::<QpqSuite>::deserialize(upload).map_err(malformed)?;
        Ok(ServerRegistration::finish(upload).serialize().to_vec())
    }

    /// Returns KE2, 320 bytes, and the state for OpaqueLoginFinish. `record` is `None` for an
    /// unknown username: the work is the same, KE2 is simulated, and no KE3 matches it. Takes about
    /// 0.3 ms of one core.
    pub fn start_login(
        &self,
        rng: &mut (impl RngCore + CryptoRng),
        username: &Username,
        record: Option<&[u8]>,
        ke1: &[u8],
    ) -> Result<(Vec<u8>, PendingLogin), OpaqueError> {
        self.start_login_in(ServerLoginParameters::default(), rng, username, record, ke1)
    }

    /// Like [`OpaqueServer::start_login`], with a context and identities, which the RFC's test
    /// vectors have and this protocol does not.
    fn start_login_in(
        &self,
        parameters: ServerLoginParameters<'_, '_>,
        rng: &mut (impl RngCore + CryptoRng),
        username: &Username,
        record: Option<&[u8]>,
        ke1: &[u8],
    ) -> Result<(Vec<u8>, PendingLogin), OpaqueError> {
        exact(ke1, len::KE1)?;
        let ke1 = CredentialRequest::deserialize(ke1).map_err(malformed)?;
        let parsed = exact(record.unwrap_or(&self.dummy_record), len::RECORD)
            .and_then(|bytes| ServerRegistration::<QpqSuite>::deserialize(bytes).map_err(malformed))
            .map_err(|_| OpaqueError::CorruptRecord)?;
        let record = record.is_some().then_some(parsed);
        let started =
            ServerLogin::start(rng, &self.setup, record, ke1, credential_id(username), parameters)
                .map_err(malformed)?;
        Ok((started.message.serialize().to_vec(), PendingLogin(Box::new(started.state))))
    }

    /// Checks the secrets by a registration and a login of an account that is never stored. Cheap,
    /// because the client stretches the password as little as possible.
    pub fn self_check(&self, rng: &mut (impl RngCore + CryptoRng)) -> Result<(), InvalidSetup> {
        self.log_in_once(rng).ok_or(InvalidSetup::SelfCheck)
    }

    fn log_in_once(&self, rng: &mut (impl RngCore + CryptoRng)) -> Option<()> {
        let username = Username::parse("self-check").expect("a plain name");
        let password = b"of no account";
        let quick = argon2::Params::new(argon2::Params::MIN_M_COST, 1, 1, None)
            .expect("the lowest that is allowed");
        let ksf = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, quick);

        let client = ClientRegistration::<QpqSuite>::start(rng, password).ok()?;
        let response = self.start_registration(&username, &client.message.serialize()).ok()?;
        let response = RegistrationResponse::deserialize(&response).ok()?;
        let parameters =
            ClientRegistrationFinishParameters::new(Identifiers::default(), Some(&ksf));
        let registered = client.state.finish(rng, password, response, parameters).ok()?;
        let record = self.finish_registration(&registered.message.serialize()).ok()?;

        let client = ClientLogin::<QpqSuite>::start(rng, password).ok()?;
        let (ke2, pending) =
            self.start_login(rng, &username, Some(&record), &client.message.serialize()).ok()?;
        let ke2 = CredentialResponse::deserialize(&ke2).ok()?;
        let parameters = ClientLoginFinishParameters::new(None, Identifiers::default(), Some(&ksf));
        let logged_in = client.state.finish(rng, password, ke2, parameters).ok()?;
        pending.finish(&logged_in.message.serialize()).ok()
    }
}

impl PendingLogin {
    /// Checks in constant time that `ke3`, 64 bytes, proves knowledge of the password.
    pub fn finish(self, ke3: &[u8]) -> Result<(), OpaqueError> {
        self.finish_in(ServerLoginParameters::default(), ke3).map(drop)
    }

    /// Returns the shared session key. This protocol does not use the key: session tokens are
    /// random.
    fn finish_in(
        self,
        parameters: ServerLoginParameters<'_, '_>,
        ke3: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, OpaqueError> {
        exact(ke3, len::KE3)?;
        let ke3 = CredentialFinalization::deserialize(ke3).map_err(malformed)?;
        let finished = self.0.finish(ke3, parameters).map_err(|_| OpaqueError::WrongPassword)?;
        Ok(Zeroizing::new(finished.session_key.to_vec()))
    }
}

/// Returns the credential identifier: the canonical username, the same at registration and login.
fn credential_id(username: &Username) -> &[u8] {
    username.as_str().as_bytes()
}

fn exact(bytes: &[u8], len: usize) -> Result<&[u8], OpaqueError> {
    if bytes.len() == len { Ok(bytes) } else { Err(OpaqueError::Malformed) }
}

/// Drops the library's reason, which would only help an attacker.
fn malformed(_: ProtocolError) -> OpaqueError {
    OpaqueError::Malformed
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
