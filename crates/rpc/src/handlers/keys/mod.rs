//! Public keys for starting conversations: KeyPackages (300, 301, 305), each handed out once, and
//! hybrid keys (302 to 304).

mod count_key_packages;
mod fetch_hybrid_key;
mod fetch_hybrid_keys;
mod fetch_key_package;
mod hybrid;
mod upload_hybrid_key;
mod upload_key_package;

use qpq_proto::convert;

use crate::{Caller, Error};

/// Checks that an upload is for the caller's own identity key. An empty field is the caller's own.
fn check_owner(caller: &Caller, identity_key: &[u8]) -> Result<(), Error> {
    match convert::optional_identity_key(identity_key, "identity_key")? {
        Some(named) if named != caller.identity => Err(Error::NotKeyOwner),
        _ => Ok(()),
    }
}
