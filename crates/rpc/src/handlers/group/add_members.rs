//! AddMembers (414).

use qpq_domain::Role;
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::AddMembers {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::AddMembersRequest) -> Handled<Self> {
        let group = convert::group_id(&request.channel_id, "channel_id")?;
        let members = convert::identity_keys(&request.member_keys, "member_keys")?;
        let role = if request.admins { Role::Admin } else { Role::Member };
        let groups = &cx.app.stores.groups;
        let added = groups.add_members(group, caller.account, members, role, cx.now).await??;
        Ok(v1::AddMembersResponse { added }.into())
    }
}
