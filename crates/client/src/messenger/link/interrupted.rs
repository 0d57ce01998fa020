//! The note of a link in progress. The next link in the same directory reads it, and revokes the
//! device of an interrupted link.

use std::{fs, path::Path};

use qpq_domain::DeviceId;
use qpq_proto::{methods, v1};

use crate::{
    client::Client,
    error::{CallError, ProfileError},
    profile::replace,
};

/// The name of the file, which contains the id of the device in hexadecimal digits.
const FILE: &str = "linking";

/// Notes a device before it can be registered.
pub(in crate::messenger) fn note(dir: &Path, device: &DeviceId) -> Result<(), ProfileError> {
    replace(&dir.join(FILE), hex::encode(device.as_bytes()).as_bytes())
}

/// Removes the note, once the link is complete.
pub(super) fn forget(dir: &Path) {
    // A note that remains is harmless: that of a complete profile is not read.
    if let Err(error) = fs::remove_file(dir.join(FILE)) {
        tracing::debug!(%error, "the note of the link was not removed");
    }
}

/// Revokes the device of an interrupted link, if one is noted. The device may be unregistered.
pub(in crate::messenger) async fn revoke(client: &Client, dir: &Path) -> Result<(), CallError> {
    let noted = fs::read(dir.join(FILE)).ok().and_then(|digits| hex::decode(digits).ok());
    let Some(device_id) = noted else { return Ok(()) };
    let request = v1::RevokeDeviceRequest { device_id: device_id.into(), ..Default::default() };
    match client.call::<methods::RevokeDevice>(request).await {
        // The file is damaged, or the account is another one.
        Err(error) if error.server().is_some() && !error.is_temporary() => {
            tracing::info!(%error, "the device of an interrupted link was not revoked");
            Ok(())
        }
        done => done.map(drop),
    }
}
