//! OpaqueRegisterFinish (101).

use qpq_domain::{IdentityKey, Username};
use qpq_ports::{NewAccount, Registration};
use qpq_proto::{
    LimitClass,
    methods::OpaqueRegisterFinish,
    v1::{OpaqueRegisterFinishRequest, OpaqueRegisterFinishResponse},
};

use super::{
    admission::{admission, invite_refused},
    exact, new_username, refused,
};
use crate::{Cx, Error, Handled, Handler, IdentityProof, Subject, opaque};

impl Handler for OpaqueRegisterFinish {
    async fn handle(cx: Cx<'_>, (): (), request: OpaqueRegisterFinishRequest) -> Handled<Self> {
        exact(&request.upload, opaque::len::RECORD, "upload")?;
        let username = new_username(cx, &request.username)?;
        cx.limit(LimitClass::Register, Subject::Username(&username)).await?;
        let identity = enrollable(&request.identity_key)?;
        check_proof(cx, &identity, &username, &request)?;
        let opaque_record =
            cx.app.opaque.finish_registration(&request.upload).map_err(refused("upload"))?;
        let admission = match admission(cx, &username, &request.invite) {
            Ok(admission) => admission,
            Err(refusal) => {
                return match is_repeat(cx, &username, &identity, &opaque_record).await? {
                    true => Ok(OpaqueRegisterFinishResponse { success: true }.into()),
                    false => Err(refusal),
                };
            }
        };
        // The start was for this account, so it is not one for a change of the password.
        cx.conn.take_registration(&username, cx.now);
        let account = NewAccount { username, identity, opaque_record, admission, now: cx.now };
        match cx.app.stores.accounts.register(account).await? {
            Registration::Registered(_) | Registration::Repeated(_) => {
                Ok(OpaqueRegisterFinishResponse { success: true }.into())
            }
            Registration::UsernameTaken => Err(Error::UsernameTaken),
            Registration::IdentityTaken => Err(Error::IdentityTaken),
            Registration::InviteInvalid => Err(invite_refused(cx)),
        }
    }
}

/// Returns whether the account is registered already. The answer to the first call may have been
/// lost, and the configuration changed since.
async fn is_repeat(
    cx: Cx<'_>,
    username: &Username,
    identity: &IdentityKey,
    opaque_record: &[u8],
) -> Result<bool, Error> {
    let stored = cx.app.stores.accounts.credentials(username).await?;
    Ok(stored.is_some_and(|stored| {
        stored.identity == *identity && stored.opaque_record == opaque_record
    }))
}

fn enrollable(bytes: &[u8]) -> Result<IdentityKey, Error> {
    let key = IdentityKey::try_from(bytes).map_err(|_| Error::InvalidIdentityKey)?;
    key.check_registrable().map_err(|_| Error::InvalidIdentityKey)?;
    Ok(key)
}

/// Checks the identity proof if there is one, whether or not it is required.
fn check_proof(
    cx: Cx<'_>,
    identity: &IdentityKey,
    username: &Username,
    request: &OpaqueRegisterFinishRequest,
) -> Result<(), Error> {
    if request.identity_proof.is_empty() {
        return match cx.app.config.identity_proof {
            IdentityProof::Optional => Ok(()),
            IdentityProof::Required => Err(Error::IdentityProofRequired),
        };
    }
    let signature: &[u8; 64] =
        request.identity_proof.as_ref().try_into().map_err(|_| Error::InvalidIdentityProof)?;
    let message = IdentityKey::registration_message(username, &request.upload);
    identity.verify(&message, signature).map_err(|_| Error::InvalidIdentityProof)
}
