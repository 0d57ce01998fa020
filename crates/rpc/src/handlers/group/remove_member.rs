//! RemoveMember (410).

use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::RemoveMember {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::RemoveMemberRequest) -> Handled<Self> {
        let group = convert::group_id(&request.channel_id, "channel_id")?;
        let member = convert::identity_key(&request.member_key, "member_key")?;
        cx.app.stores.groups.remove_member(group, caller.account, member).await??;
        Ok(v1::RemoveMemberResponse { success: true }.into())
    }
}
