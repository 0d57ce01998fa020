//! Public keys for starting conversations: KeyPackages (300, 301, 305), each given out once, and
//! hybrid keys (302 to 304).

mod hybrid;
mod hybrid_keys;
mod packages;

use qpq_proto::convert;

use crate::{Caller, Error};

/// Keys are uploaded by their owner alone, who may name itself or leave that out.
fn check_owner(caller: &Caller, identity_key: &[u8]) -> Result<(), Error> {
    match convert::optional_identity_key(identity_key, "identity_key")? {
        Some(named) if named != caller.identity => Err(Error::NotKeyOwner),
        _ => Ok(()),
    }
}
