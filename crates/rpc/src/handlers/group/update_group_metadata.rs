//! UpdateGroupMetadata (411).

use qpq_domain::{MAX_GROUP_DESCRIPTION, MAX_GROUP_NAME, MAX_GROUP_SETTINGS};
use qpq_ports::MetadataChange;
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::UpdateGroupMetadata {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::UpdateGroupMetadataRequest,
    ) -> Handled<Self> {
        let group = convert::group_id(&request.channel_id, "channel_id")?;
        let v1::UpdateGroupMetadataRequest { name, description, settings, .. } = request;
        convert::no_longer_than(name.as_deref().unwrap_or_default(), MAX_GROUP_NAME, "name")?;
        convert::no_longer_than(
            description.as_deref().unwrap_or_default(),
            MAX_GROUP_DESCRIPTION,
            "description",
        )?;
        convert::no_longer_than(
            settings.as_deref().unwrap_or_default(),
            MAX_GROUP_SETTINGS,
            "settings",
        )?;
        let expected_version = (request.expected_version > 0).then_some(request.expected_version);
        let change = MetadataChange { name, description, settings, expected_version };
        let version = cx.app.stores.groups.update(group, caller.account, change).await??;
        Ok(v1::UpdateGroupMetadataResponse { success: true, version }.into())
    }
}
