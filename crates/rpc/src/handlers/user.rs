//! Look-ups from a username to an identity key (500) and back (501). Both need a session and
//! consume its account's budget, so that no client can enumerate the accounts.

use bytes::Bytes;
use qpq_domain::Username;
use qpq_ports::Device;
use qpq_proto::{
    convert,
    methods::{ResolveIdentity, ResolveUser},
    v1::{
        DeviceKey, ResolveIdentityRequest, ResolveIdentityResponse, ResolveUserRequest,
        ResolveUserResponse,
    },
};

use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for ResolveUser {
    async fn handle(cx: Cx<'_>, _: Caller, request: ResolveUserRequest) -> Handled<Self> {
        let name = local_part(&request.username, &cx.app.config.domain)?;
        let username = Username::parse(name).map_err(|_| Error::InvalidUsername)?;
        let account =
            cx.app.stores.accounts.by_username(&username).await?.ok_or(Error::UserNotFound)?;
        Ok(ResolveUserResponse {
            identity_key: account.identity.as_bytes().to_vec().into(),
            inclusion_proof: Default::default(),
        }
        .into())
    }
}

impl Handler for ResolveIdentity {
    async fn handle(cx: Cx<'_>, _: Caller, request: ResolveIdentityRequest) -> Handled<Self> {
        let identity = convert::identity_key(&request.identity_key, "identity_key")?;
        let account =
            cx.app.stores.accounts.by_identity(&identity).await?.ok_or(Error::UserNotFound)?;
        let devices = cx.app.stores.devices.list(account.id).await?;
        Ok(ResolveIdentityResponse {
            username: account.username.as_str().to_owned(),
            created_at: account.created_at.0,
            device_count: u32::try_from(devices.len()).unwrap_or(u32::MAX),
            revoked: false,
            devices: devices.into_iter().map(device_key).collect(),
        }
        .into())
    }
}

fn device_key(device: Device) -> DeviceKey {
    let bytes = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    let key = device.key.as_ref();
    DeviceKey {
        device_id: bytes(device.id.as_bytes()),
        device_key: key.map_or_else(Bytes::new, |key| bytes(key.key.as_bytes())),
        device_proof: key.map_or_else(Bytes::new, |key| bytes(&key.proof)),
        registered_at: device.registered_at.0,
    }
}

/// Returns the name in `name@domain` if the domain is this server's. A name without a domain is
/// local.
fn local_part<'a>(name: &'a str, own_domain: &str) -> Result<&'a str, Error> {
    match name.rsplit_once('@') {
        None => Ok(name),
        Some((local, domain))
            if !own_domain.is_empty() && domain.eq_ignore_ascii_case(own_domain) =>
        {
            Ok(local)
        }
        Some(_) => Err(Error::UnknownDomain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_domain_or_with_this_servers_are_local() {
        assert_eq!(local_part("alice", "example.org").ok(), Some("alice"));
        assert_eq!(local_part("alice@example.org", "example.org").ok(), Some("alice"));
        assert_eq!(local_part("alice@EXAMPLE.org", "example.org").ok(), Some("alice"));
    }

    #[test]
    fn names_with_another_domain_are_not_local() {
        for (name, own) in [
            ("alice@elsewhere.org", "example.org"),
            ("alice@", "example.org"),
            ("alice@", ""),
            ("a@b@c", "example.org"),
        ] {
            assert!(matches!(local_part(name, own), Err(Error::UnknownDomain)), "{name}");
        }
    }
}
