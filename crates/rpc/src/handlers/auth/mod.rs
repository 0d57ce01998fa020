//! Registration, login and logout (100 to 104).
//!
//! The response to a login does not reveal whether the username exists: both starts have the same
//! form and cost, a finish without the right password has one error, and budgets depend on the
//! username in the request.

mod logout;
mod opaque_login_finish;
mod opaque_login_start;
mod opaque_register_finish;
mod opaque_register_start;

use qpq_domain::Username;

use crate::{Cx, Error, opaque::OpaqueError};

fn username(raw: &str) -> Result<Username, Error> {
    Username::parse(raw).map_err(|_| Error::InvalidUsername)
}

/// Parses the username of a new account. Older accounts may have names that this refuses.
fn new_username(cx: Cx<'_>, raw: &str) -> Result<Username, Error> {
    let username = username(raw)?;
    username.check_new(cx.app.config.username_scripts).map_err(|_| Error::InvalidUsername)?;
    Ok(username)
}

fn exact(bytes: &[u8], len: usize, field: &'static str) -> Result<(), Error> {
    if bytes.len() == len { Ok(()) } else { Err(Error::MalformedOpaque(field)) }
}

/// Returns the meaning of an OPAQUE error for the client that sent `field`.
fn refused(field: &'static str) -> impl Fn(OpaqueError) -> Error {
    move |error| match error {
        OpaqueError::Malformed => Error::MalformedOpaque(field),
        OpaqueError::WrongPassword => Error::LoginFailed,
        OpaqueError::CorruptRecord => Error::internal(error),
    }
}
