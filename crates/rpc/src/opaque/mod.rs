//! The server's side of OPAQUE-3DH (RFC 9807): registration and login by password, the password
//! never seen.
//!
//! [`OpaqueServer`] owns the deployment's long-term secrets and is the only code that touches
//! `opaque-ke`. It checks the exact length of every message first, because the library's parsers
//! let trailing bytes through, and it does the same work for a user that does not exist as for one
//! that does (RFC 9807 §6.3.2.2).

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

/// Lengths of the messages, in bytes (RFC 9807 §5.1 and §6.1 with this suite).
pub mod len {
    pub const REGISTRATION_REQUEST: usize = 32;
    pub const REGISTRATION_RESPONSE: usize = 64;
    /// The registration record: what the client uploads and what is stored.
    pub const RECORD: usize = 192;
    pub const KE1: usize = 96;
    pub const KE2: usize = 320;
    pub const KE3: usize = 64;
    /// OPRF seed 64 ‖ server private key 32 ‖ public key for unknown users 32.
    pub const SETUP: usize = 128;
}

/// The suite: ristretto255-SHA512, HKDF- and HMAC-SHA-512, 3DH over ristretto255. The key
/// stretching function is the client's alone; it is named here because the library's type wants one
/// and because one client must match another.
#[derive(Debug)]
pub struct QpqSuite;

impl CipherSuite for QpqSuite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, Sha512>;
    type Ksf = argon2::Argon2<'static>;
}

/// Why a message was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpaqueError {
    #[error("not a well-formed OPAQUE message")]
    Malformed,
    /// Or no such user, which nobody can tell.
    #[error("wrong password")]
    WrongPassword,
    #[error("a stored OPAQUE record does not parse")]
    CorruptRecord,
}

/// Why the server's OPAQUE secrets cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSetup {
    #[error("the OPAQUE setup must be exactly 128 bytes; restore the file from a backup")]
    Length,
    #[error("the OPAQUE setup holds no valid key; restore the file from a backup")]
    Key,
    #[error("a login with the OPAQUE setup failed its self-check; restore the file from a backup")]
    SelfCheck,
}

/// What the server keeps between LoginStart and LoginFinish. As good as a session to whoever reads
/// it: it stays in memory and is wiped when dropped.
pub struct PendingLogin(Box<ServerLogin<QpqSuite>>);

impl fmt::Debug for PendingLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PendingLogin(redacted)")
    }
}

/// The deployment's OPAQUE secrets. One for all edges and for ever: without them no password works
/// again.
pub struct OpaqueServer {
    setup: ServerSetup<QpqSuite>,
    /// A valid record that belongs to nobody, parsed where there is no real one.
    nobody: [u8; len::RECORD],
}

impl fmt::Debug for OpaqueServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpaqueServer(redacted)")
    }
}

impl OpaqueServer {
    /// New secrets. Every account registered with others is lost to these.
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self::new(ServerSetup::new(rng))
    }

    /// The secrets that [`OpaqueServer::serialize`] gave, checked for use.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidSetup> {
        if bytes.len() != len::SETUP {
            return Err(InvalidSetup::Length);
        }
        ServerSetup::deserialize(bytes).map(Self::new).map_err(|_| InvalidSetup::Key)
    }

    /// What to store, readable by the server's user alone.
    pub fn serialize(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = self.setup.serialize();
        let kept = Zeroizing::new(bytes.to_vec());
        bytes.as_mut_slice().zeroize();
        kept
    }

    fn new(setup: ServerSetup<QpqSuite>) -> Self {
        let mut nobody = [0; len::RECORD];
        // client_public_key 32 ‖ masking_key 64 ‖ envelope 96: any valid point makes the whole a
        // valid record.
        nobody[..32].copy_from_slice(&setup.keypair().public().serialize());
        Self { setup, nobody }
    }

    /// RegistrationResponse, 64 bytes. Depends on the name and the request alone.
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

    /// The record to store for an upload: 192 bytes, the upload itself once it is known to be one.
    pub fn finish_registration(&self, upload: &[u8]) -> Result<Vec<u8>, OpaqueError> {
        exact(upload, len::RECORD)?;
        let upload = RegistrationUpload::<QpqSuite>::deserialize(upload).map_err(malformed)?;
        Ok(ServerRegistration::finish(upload).serialize().to_vec())
    }

    /// KE2, 320 bytes, and what LoginFinish needs. `record` is `None` for a user that does not
    /// exist: the work is the same, the answer is made up, and no KE3 will match it. About 0.3 ms
    /// of one core.
    pub fn start_login(
        &self,
        rng: &mut (impl RngCore + CryptoRng),
        username: &Username,
        record: Option<&[u8]>,
        ke1: &[u8],
    ) -> Result<(Vec<u8>, PendingLogin), OpaqueError> {
        self.start_login_in(ServerLoginParameters::default(), rng, username, record, ke1)
    }

    /// The context and identities are parts of the transcript: the protocol has none, the RFC's
    /// vectors have.
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
        let parsed = exact(record.unwrap_or(&self.nobody), len::RECORD)
            .and_then(|bytes| ServerRegistration::<QpqSuite>::deserialize(bytes).map_err(malformed))
            .map_err(|_| OpaqueError::CorruptRecord)?;
        let record = record.is_some().then_some(parsed);
        let started =
            ServerLogin::start(rng, &self.setup, record, ke1, credential_id(username), parameters)
                .map_err(malformed)?;
        Ok((started.message.serialize().to_vec(), PendingLogin(Box::new(started.state))))
    }

    /// Registers and logs in a user that is never stored, with the server's own secrets: whether a
    /// password would work. Cheap, as the client in it does not stretch its password.
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
    /// Whether `ke3`, 64 bytes, shows knowledge of the password. In constant time.
    pub fn finish(self, ke3: &[u8]) -> Result<(), OpaqueError> {
        self.finish_in(ServerLoginParameters::default(), ke3).map(drop)
    }

    /// The session key that both sides now have; the protocol does not use it (tokens are random
    /// instead).
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

/// The canonical name is what the password is bound to: it must be the same at registration and at
/// every login.
fn credential_id(username: &Username) -> &[u8] {
    username.as_str().as_bytes()
}

fn exact(bytes: &[u8], len: usize) -> Result<&[u8], OpaqueError> {
    if bytes.len() == len { Ok(bytes) } else { Err(OpaqueError::Malformed) }
}

/// What exactly the library disliked helps nobody but an attacker.
fn malformed(_: ProtocolError) -> OpaqueError {
    OpaqueError::Malformed
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
