//! ListGroupMembers (412).

use bytes::Bytes;
use qpq_domain::{MAX_GROUP_DESCRIPTION, MAX_GROUP_NAME, MAX_GROUP_SETTINGS, Role, WrongLength};
use qpq_ports::{Member, MemberPage};
use qpq_proto::{FieldError, convert, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler};

/// The maximum number of members of one answer.
const MAX_PAGE: u32 = 1_000;

/// The maximum size of a member in the answer, in bytes: a key, a username of up to 64 characters,
/// and numbers.
const MEMBER_BYTES: usize = 32 + 64 * 4 + 32;

/// The maximum size of the rest of the answer, in bytes.
const METADATA_BYTES: usize = MAX_GROUP_NAME + MAX_GROUP_DESCRIPTION + MAX_GROUP_SETTINGS + 64;

impl Handler for methods::ListGroupMembers {
    fn answer_bytes(request: &v1::ListGroupMembersRequest) -> usize {
        METADATA_BYTES + limit(request.limit) as usize * MEMBER_BYTES
    }

    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::ListGroupMembersRequest,
    ) -> Handled<Self> {
        let group = convert::group_id(&request.channel_id, "channel_id")?;
        let page = MemberPage { after: after(&request.cursor)?, limit: limit(request.limit) };
        let view = cx.app.stores.groups.members(group, caller.account, page).await??;
        Ok(v1::ListGroupMembersResponse {
            members: view.members.into_iter().map(listed).collect(),
            next_cursor: view.next.map_or_else(Bytes::new, cursor),
            name: view.name,
            description: view.description,
            settings: view.settings,
            version: view.version,
            epoch: view.epoch,
        }
        .into())
    }
}

fn limit(requested: u32) -> u32 {
    convert::limit(requested).map_or(MAX_PAGE, u32::from).min(MAX_PAGE)
}

/// Parses a cursor: the place of the last member of the previous page, 8 bytes, big-endian.
fn after(cursor: &[u8]) -> Result<u64, Error> {
    if cursor.is_empty() {
        return Ok(0);
    }
    let place = cursor.try_into().map(u64::from_be_bytes);
    place.map_err(|_| {
        let reason = WrongLength { expected: 8, actual: cursor.len() };
        FieldError::new("cursor", reason).into()
    })
}

fn cursor(place: u64) -> Bytes {
    Bytes::copy_from_slice(&place.to_be_bytes())
}

fn listed(member: Member) -> v1::GroupMember {
    v1::GroupMember {
        identity_key: Bytes::copy_from_slice(member.identity.as_bytes()),
        username: member.username,
        role: match member.role {
            Role::Member => 0,
            Role::Admin => 1,
        },
        joined_at: member.joined_at.0,
    }
}
