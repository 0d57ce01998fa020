//! Registration, login, logout and change of the password (100 to 105).
//!
//! A login does not reveal whether the username exists. OpaqueLoginStart has the same form and cost
//! in both cases, OpaqueLoginFinish has one error for every failure, and budgets depend only on the
//! username in the request.

mod admission;
mod change_password;
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

/// Parses the username of a new account.
fn new_username(cx: Cx<'_>, raw: &str) -> Result<Username, Error> {
    let username = username(raw)?;
    check_new(cx, &username)?;
    Ok(username)
}

/// Checks the username of a new account. Accounts from before a stricter configuration may have
/// names that are refused here.
fn check_new(cx: Cx<'_>, username: &Username) -> Result<(), Error> {
    username.check_new(cx.app.config.username_scripts).map_err(|_| Error::InvalidUsername)
}

fn exact(bytes: &[u8], len: usize, field: &'static str) -> Result<(), Error> {
    if bytes.len() == len { Ok(()) } else { Err(Error::MalformedOpaque(field)) }
}

/// Returns the conversion of OPAQUE errors in `field` to the errors of a call.
fn refused(field: &'static str) -> impl Fn(OpaqueError) -> Error {
    move |error| match error {
        OpaqueError::Malformed => Error::MalformedOpaque(field),
        OpaqueError::WrongPassword => Error::LoginFailed,
        OpaqueError::CorruptRecord => Error::internal(error),
    }
}
