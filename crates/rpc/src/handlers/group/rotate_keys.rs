//! RotateKeys (413): asks the clients of all members to rotate their keys.

use bytes::Bytes;
use prost::Message as _;
use qpq_domain::MessageId;
use qpq_ports::{GroupMessage, GroupRecipients};
use qpq_proto::{ROTATION_PREFIX, convert, methods, v1};
use rand::{RngCore as _, rngs::OsRng};
use sha2::{Digest as _, Sha256};

use crate::{
    Caller, Cx, Handled, Handler,
    handlers::delivery::group_message::{charge_members, charge_payload},
};

/// The maximum length of a reason, in bytes.
const MAX_REASON: usize = 1 << 10;

impl Handler for methods::RotateKeys {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::RotateKeysRequest) -> Handled<Self> {
        let group = convert::group_id(&request.channel_id, "channel_id")?;
        convert::no_longer_than(&request.reason, MAX_REASON, "reason")?;
        let mut rotation_id = [0; 16];
        OsRng.fill_bytes(&mut rotation_id);
        let rotation = v1::RotationRequest {
            rotation_id: Bytes::copy_from_slice(&rotation_id),
            channel_id: Bytes::copy_from_slice(group.as_bytes()),
            requested_by: Bytes::copy_from_slice(caller.identity.as_bytes()),
            reason: request.reason,
            at: cx.now.0,
        };
        let payload: Bytes = [&ROTATION_PREFIX[..], &rotation.encode_to_vec()].concat().into();
        charge_payload(cx, &caller, payload.len()).await?;
        let message = GroupMessage {
            group,
            sender: caller.account,
            sender_key: caller.identity,
            sender_device: caller.device,
            recipients: GroupRecipients::All,
            payload_sha256: Sha256::digest(&payload).into(),
            payload,
            message_id: Some(MessageId::new(rotation_id)),
            ttl: cx.app.config.delivery.default_ttl,
            now: cx.now,
            commit: None,
        };
        let sent = cx.app.stores.groups.send(message).await??;
        charge_members(cx, &caller, sent.recipients);
        Ok(v1::RotateKeysResponse { success: true, rotation_id: rotation.rotation_id }.into())
    }
}
