//! Health (802): the state of this server, and the key that verifies its delivery proofs. Load
//! balancers call it often, so it reads no store.

use qpq_proto::{
    methods::Health,
    v1::{HealthRequest, HealthResponse},
};

use crate::{App, Cx, Handled, Handler};

impl Handler for Health {
    async fn handle(cx: Cx<'_>, (): (), _: HealthRequest) -> Handled<Self> {
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
