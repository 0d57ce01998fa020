//! The client's side of OPAQUE-3DH (RFC 9807), without network: the messages to send, and the
//! processing of the answers.
//!
//! Suite: ristretto255 and SHA-512, no context, no explicit identities; Argon2id with 19 MiB, 2
//! passes and 1 lane stretches the password. The stretching takes tens of milliseconds and memory,
//! so the finishing steps are blocking: call them on a thread for blocking work.

use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialResponse, RegistrationResponse, Ristretto255,
    TripleDh, errors::ProtocolError,
};
use rand::rngs::OsRng;
use zeroize::Zeroizing;

use crate::secret::{ExportKey, Password};

/// The suite of the protocol; part of every account's record, so it can never change.
pub(crate) struct Suite;

impl CipherSuite for Suite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, sha2::Sha512>;
    type Ksf = argon2::Argon2<'static>;
}

/// Lengths of the server's messages, in bytes. The library would accept trailing bytes.
const REGISTRATION_RESPONSE: usize = 64;
const LOGIN_RESPONSE: usize = 320;

/// The error of processing an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpaqueError {
    /// The password is not the account's, or the account does not exist. The protocol does not
    /// distinguish the two.
    #[error("wrong username or password")]
    WrongPassword,
    #[error("the server's answer is not an OPAQUE message")]
    Malformed,
}

impl From<ProtocolError> for OpaqueError {
    fn from(error: ProtocolError) -> Self {
        match error {
            ProtocolError::InvalidLoginError => Self::WrongPassword,
            _ => Self::Malformed,
        }
    }
}

/// A registration that waits for the answer to its request.
pub(crate) struct Registration(ClientRegistration<Suite>);

impl Registration {
    /// Returns the state to keep and the request (32 bytes) to send.
    pub(crate) fn start(password: &Password) -> (Self, Vec<u8>) {
        let started = ClientRegistration::<Suite>::start(&mut OsRng, password.expose())
            .expect("hashing a password to the group fails with negligible probability");
        (Self(started.state), started.message.serialize().to_vec())
    }

    /// Returns the record to upload (192 bytes) and the key that only this password yields.
    /// Blocking.
    pub(crate) fn finish(
        self,
        password: &Password,
        response: &[u8],
    ) -> Result<(Vec<u8>, ExportKey), OpaqueError> {
        if response.len() != REGISTRATION_RESPONSE {
            return Err(OpaqueError::Malformed);
        }
        let response = RegistrationResponse::deserialize(response)?;
        let finished = self.0.finish(
            &mut OsRng,
            password.expose(),
            response,
            ClientRegistrationFinishParameters::default(),
        )?;
        Ok((finished.message.serialize().to_vec(), export_key(&finished.export_key)))
    }
}

/// A login that waits for the answer to its request.
pub(crate) struct Login(ClientLogin<Suite>);

impl Login {
    /// Returns the state to keep and the request (96 bytes) to send.
    pub(crate) fn start(password: &Password) -> (Self, Vec<u8>) {
        let started = ClientLogin::<Suite>::start(&mut OsRng, password.expose())
            .expect("hashing a password to the group fails with negligible probability");
        (Self(started.state), started.message.serialize().to_vec())
    }

    /// Returns the finalization to send (64 bytes) and the key that only this password yields.
    /// Blocking.
    pub(crate) fn finish(
        self,
        password: &Password,
        response: &[u8],
    ) -> Result<(Vec<u8>, ExportKey), OpaqueError> {
        if response.len() != LOGIN_RESPONSE {
            return Err(OpaqueError::Malformed);
        }
        let response = CredentialResponse::deserialize(response)?;
        let finished = self.0.finish(
            &mut OsRng,
            password.expose(),
            response,
            ClientLoginFinishParameters::default(),
        )?;
        Ok((finished.message.serialize().to_vec(), export_key(&finished.export_key)))
    }
}

fn export_key(bytes: &[u8]) -> ExportKey {
    let mut key = Zeroizing::new([0; ExportKey::LEN]);
    key.copy_from_slice(bytes);
    ExportKey::new(key)
}

#[cfg(test)]
mod tests {
    use opaque_ke::{
        CredentialFinalization, CredentialRequest, RegistrationRequest, RegistrationUpload,
        ServerLogin, ServerLoginParameters, ServerRegistration, ServerSetup,
    };

    use super::*;

    fn register(
        setup: &ServerSetup<Suite>,
        password: &Password,
    ) -> (ServerRegistration<Suite>, ExportKey) {
        let (state, request) = Registration::start(password);
        let request = RegistrationRequest::deserialize(&request).unwrap();
        let answer =
            ServerRegistration::start(setup, request, b"alice").unwrap().message.serialize();
        let (upload, export_key) = state.finish(password, &answer).unwrap();
        assert_eq!(upload.len(), 192);
        (ServerRegistration::finish(RegistrationUpload::deserialize(&upload).unwrap()), export_key)
    }

    #[test]
    fn the_password_that_registered_logs_in_and_yields_the_same_export_key() {
        let setup = ServerSetup::<Suite>::new(&mut OsRng);
        let password = Password::from("correct horse");
        let (record, registered) = register(&setup, &password);
        let (state, request) = Login::start(&password);
        let started = ServerLogin::start(
            &mut OsRng,
            &setup,
            Some(record),
            CredentialRequest::deserialize(&request).unwrap(),
            b"alice",
            ServerLoginParameters::default(),
        )
        .unwrap();
        let (finalization, logged_in) =
            state.finish(&password, &started.message.serialize()).unwrap();
        assert_eq!(registered.expose(), logged_in.expose());
        let finalization = CredentialFinalization::deserialize(&finalization).unwrap();
        started.state.finish(finalization, ServerLoginParameters::default()).unwrap();
    }

    #[test]
    fn a_wrong_password_and_an_unknown_user_look_alike() {
        let setup = ServerSetup::<Suite>::new(&mut OsRng);
        let (record, _) = register(&setup, &Password::from("right"));
        for record in [Some(record), None] {
            let wrong = Password::from("wrong");
            let (state, request) = Login::start(&wrong);
            let started = ServerLogin::start(
                &mut OsRng,
                &setup,
                record,
                CredentialRequest::deserialize(&request).unwrap(),
                b"alice",
                ServerLoginParameters::default(),
            )
            .unwrap();
            let answer = started.message.serialize();
            assert_eq!(state.finish(&wrong, &answer).err(), Some(OpaqueError::WrongPassword));
        }
    }

    #[test]
    fn an_answer_of_another_length_is_malformed() {
        let password = Password::from("right");
        for len in [0, 319, 321] {
            let (state, _) = Login::start(&password);
            assert_eq!(state.finish(&password, &vec![0; len]).err(), Some(OpaqueError::Malformed));
        }
        for len in [0, 63, 65] {
            let (state, _) = Registration::start(&password);
            assert_eq!(state.finish(&password, &vec![0; len]).err(), Some(OpaqueError::Malformed));
        }
    }
}
