//! FetchGroupInfo (415).

use qpq_domain::MAX_GROUP_INFO;
use qpq_ports::GroupInfo;
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::FetchGroupInfo {
    fn answer_bytes(_: &v1::FetchGroupInfoRequest) -> usize {
        MAX_GROUP_INFO
    }

    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchGroupInfoRequest,
    ) -> Handled<Self> {
        let group = convert::group_id(&request.channel_id, "channel_id")?;
        let GroupInfo { group_info, epoch } =
            cx.app.stores.groups.info(group, caller.account).await??;
        let group_info = group_info.unwrap_or_default();
        Ok(v1::FetchGroupInfoResponse { group_info, epoch }.into())
    }
}
