//! The rule for who may register.
//!
//! A username of an administrator counts as taken, unless the registration has an invite that names
//! it. Otherwise a stranger could register a name that the configuration lists and become
//! administrator. A name that looks like one of an administrator is reserved too.

use qpq_domain::{InviteCode, InviteHash, Username};
use qpq_ports::Admission;

use crate::{Cx, Error, RegistrationMode};

/// Returns the condition under which `username` may be registered with `invite`, the text in the
/// request.
pub(super) fn admission(cx: Cx<'_>, username: &Username, invite: &str) -> Result<Admission, Error> {
    let is_reserved = cx.app.is_reserved(username);
    match cx.app.config.registration {
        RegistrationMode::Closed => Err(Error::RegistrationClosed),
        RegistrationMode::Open if !is_reserved => Ok(Admission::Open),
        // Another error would reveal that the name is one of an administrator.
        RegistrationMode::Open => {
            code(invite).map(Admission::NamedInvite).ok_or(Error::UsernameTaken)
        }
        RegistrationMode::Invite if invite.trim().is_empty() => Err(Error::InviteRequired),
        RegistrationMode::Invite => {
            let code = code(invite).ok_or(Error::InviteInvalid)?;
            Ok(if is_reserved { Admission::NamedInvite(code) } else { Admission::Invite(code) })
        }
    }
}

/// Returns the error for an invite that the store refuses.
pub(super) fn invite_refused(cx: Cx<'_>) -> Error {
    match cx.app.config.registration {
        // Only a reserved name needs an invite.
        RegistrationMode::Open => Error::UsernameTaken,
        RegistrationMode::Invite | RegistrationMode::Closed => Error::InviteInvalid,
    }
}

fn code(text: &str) -> Option<InviteHash> {
    InviteCode::parse(text).ok().map(|code| code.hash())
}
