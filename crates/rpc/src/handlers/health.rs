//! Health (802): whether this server serves, and the key that its delivery proofs are signed with.
//! It touches nothing: load balancers ask it often.

use qpq_proto::{
    methods::Health,
    v1::{HealthRequest, HealthResponse},
};

use crate::{Answered, App, Cx, Error, Handler};

impl Handler for Health {
    async fn handle(
        cx: Cx<'_>,
        (): (),
        _: HealthRequest,
    ) -> Result<Answered<HealthResponse>, Error> {
        Ok(HealthResponse {
            status: status(cx.app).into(),
            uptime_secs: cx.app.uptime().as_secs(),
            version: cx.app.config.version.clone(),
            server_key: cx.app.signer.public_key().to_vec().into(),
            domain: cx.app.config.domain.clone(),
            store_id: cx.app.stores.maintenance.store_id().as_bytes().to_vec().into(),
        }
        .into())
    }
}

fn status(app: &App) -> &'static str {
    match (app.is_draining(), app.store_fails()) {
        (true, _) => "draining",
        (false, true) => "degraded",
        (false, false) => "ok",
    }
}
