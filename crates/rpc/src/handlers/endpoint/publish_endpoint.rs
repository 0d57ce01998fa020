//! PublishEndpoint (800).

use std::time::Duration;

use qpq_domain::MAX_ENDPOINT;
use qpq_ports::Endpoint;
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Handled, Handler};

/// The lifetime of an endpoint if the request has none.
const DEFAULT_TTL: Duration = Duration::from_secs(60 * 60);
/// The longest lifetime of an endpoint.
const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

impl Handler for methods::PublishEndpoint {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::PublishEndpointRequest,
    ) -> Handled<Self> {
        convert::no_longer_than(&request.node_addr, MAX_ENDPOINT, "node_addr")?;
        let endpoints = &cx.app.stores.endpoints;
        if request.node_addr.is_empty() {
            endpoints.remove(&caller.identity).await?;
            return Ok(v1::PublishEndpointResponse { success: true, expires_at: 0 }.into());
        }
        let expires_at = cx.now.plus(ttl(request.ttl_secs));
        let endpoint = Endpoint { node_addr: request.node_addr, expires_at };
        endpoints.publish(&caller.identity, endpoint, cx.now).await?;
        Ok(v1::PublishEndpointResponse { success: true, expires_at: expires_at.0 }.into())
    }
}

fn ttl(seconds: u32) -> Duration {
    match seconds {
        0 => DEFAULT_TTL,
        seconds => Duration::from_secs(seconds.into()).min(MAX_TTL),
    }
}
