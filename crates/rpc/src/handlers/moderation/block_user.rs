//! BlockUser (425).

use qpq_ports::{Blocking, Unblocking};
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for methods::BlockUser {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::BlockUserRequest) -> Handled<Self> {
        let subject = convert::identity_key(&request.identity_key, "identity_key")?;
        let blocks = &cx.app.stores.blocks;
        if request.unblock {
            match blocks.unblock(caller.account, subject).await? {
                Unblocking::Unblocked => {}
                Unblocking::NoSuchAccount => return Err(Error::UserNotFound),
            }
        } else {
            match blocks.block(caller.account, subject, cx.now).await? {
                Blocking::Blocked => {}
                Blocking::NoSuchAccount => return Err(Error::UserNotFound),
                Blocking::OwnAccount => return Err(Error::OwnAccount),
                Blocking::Full => return Err(Error::TooManyBlocks),
            }
        }
        Ok(v1::BlockUserResponse { success: true }.into())
    }
}
