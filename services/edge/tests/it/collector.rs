//! An OpenTelemetry collector that keeps all spans. Real collectors use the same protocol.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tonic::{
    Request, Response, Status,
    transport::{Identity, ServerTlsConfig, server::TcpIncoming},
};

const HANGS: Duration = Duration::from_secs(60);

/// A received span, and the name of its service.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) service: String,
    pub(crate) inner: v1::Span,
}

impl Span {
    pub(crate) fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn get(&self, key: &str) -> Option<String> {
        self.inner.attributes.iter().find(|attribute| attribute.key == key).map(text)
    }

    pub(crate) fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<_> =
            self.inner.attributes.iter().map(|attribute| &*attribute.key).collect();
        keys.sort_unstable();
        keys
    }

    pub(crate) fn is_error(&self) -> bool {
        self.inner
            .status
            .as_ref()
            .is_some_and(|status| status.code() == v1::status::StatusCode::Error)
    }
}

fn text(attribute: &KeyValue) -> String {
    match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

/// A collector on a free port.
pub(crate) struct Collector {
    address: SocketAddr,
    spans: watch::Receiver<Vec<Span>>,
    server: JoinHandle<()>,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        Self::serve(tonic::transport::Server::builder()).await
    }

    /// Starts a collector with TLS. Its name is `localhost`.
    pub(crate) async fn start_tls(identity: Identity) -> Self {
        let tls = ServerTlsConfig::new().identity(identity);
        Self::serve(tonic::transport::Server::builder().tls_config(tls).unwrap()).await
    }

    async fn serve(mut builder: tonic::transport::Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (kept, spans) = watch::channel(Vec::new());
        let service = TraceServiceServer::new(Receiver(Arc::new(kept)));
        let server = tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener);
            builder.add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { address, spans, server }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn tls_url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// Returns all spans received so far.
    pub(crate) fn spans(&self) -> Vec<Span> {
        self.spans.borrow().clone()
    }

    /// Waits until `enough` returns true for the received spans. Returns these spans.
    pub(crate) async fn until(&mut self, enough: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let arrived = timeout(HANGS, self.spans.wait_for(|spans| enough(spans))).await.is_ok();
        assert!(arrived, "the expected spans are not in {:#?}", self.spans());
        self.spans()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Receiver(Arc<watch::Sender<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut received = Vec::new();
        for resource in request.into_inner().resource_spans {
            let attributes =
                resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let service =
                attributes.iter().find(|attribute| attribute.key == "service.name").map(text);
            let service = service.unwrap_or_default();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            received.extend(spans.map(|inner| Span { service: service.clone(), inner }));
        }
        self.0.send_modify(|spans| spans.extend(received));
        Ok(Response::new(ExportTraceServiceResponse { partial_success: None }))
    }
}
