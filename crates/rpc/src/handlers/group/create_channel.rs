//! CreateChannel (400).

use bytes::Bytes;
use qpq_domain::{GroupId, MAX_GROUP_DESCRIPTION, MAX_GROUP_NAME, Pair};
use qpq_ports::{Creation, NewGroup, NewMembers};
use qpq_proto::{FieldError, convert, convert::FieldReason, methods, v1};
use rand::{RngCore as _, rngs::OsRng};

use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for methods::CreateChannel {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::CreateChannelRequest,
    ) -> Handled<Self> {
        convert::no_longer_than(&request.name, MAX_GROUP_NAME, "name")?;
        convert::no_longer_than(&request.description, MAX_GROUP_DESCRIPTION, "description")?;
        let members = members(&caller, &request)?;
        let id = if request.channel_id.is_empty() {
            random_id()
        } else {
            convert::group_id(&request.channel_id, "channel_id")?
        };
        let group = NewGroup {
            id,
            creator: caller.account,
            members,
            name: request.name,
            description: request.description,
            now: cx.now,
        };
        let (id, was_new) = match cx.app.stores.groups.create(group).await?? {
            Creation::Created(id) => (id, true),
            Creation::Existed(id) => (id, false),
        };
        let channel_id = Bytes::copy_from_slice(id.as_bytes());
        Ok(v1::CreateChannelResponse { channel_id, was_new }.into())
    }
}

/// Returns the members: the caller and its peer, or the caller and the listed accounts.
fn members(caller: &Caller, request: &v1::CreateChannelRequest) -> Result<NewMembers, Error> {
    let refused = |field| FieldError::new(field, FieldReason::Combination);
    match convert::optional_identity_key(&request.peer_key, "peer_key")? {
        Some(_) if !request.member_keys.is_empty() => Err(refused("member_keys").into()),
        Some(peer) => {
            let pair = Pair::new(caller.identity, peer).ok_or_else(|| refused("peer_key"))?;
            Ok(NewMembers::Direct(pair))
        }
        None => {
            let listed = convert::identity_keys(&request.member_keys, "member_keys")?;
            Ok(NewMembers::Listed(listed))
        }
    }
}

fn random_id() -> GroupId {
    let mut id = [0; 16];
    OsRng.fill_bytes(&mut id);
    GroupId::new(id)
}
