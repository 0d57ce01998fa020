//! Traces of calls, sent to an OpenTelemetry collector (OTLP over gRPC). Off unless a collector is
//! configured.
//!
//! The code marks its steps with `tracing` spans at level debug: target `qpq::rpc` for a call,
//! `qpq::store` for the requests to Postgres and Redis. Spans contain names, counts and codes;
//! never an account, a key, an address or a payload. This layer exports these spans and no others,
//! independent of the log's filter. Without it the spans are disabled and cost one comparison each.
//!
//! A sampled call is traced with all its child spans. A separate thread exports spans in batches
//! from a bounded queue. If the collector is slow or unreachable, spans are dropped and no call
//! waits.

use std::{fmt, time::Duration};

use figment::value::Value;
use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{
    ExporterBuildError, SpanExporter, WithExportConfig as _, WithTonicConfig as _,
    tonic_types::transport::ClientTlsConfig,
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracerProvider},
};
use tracing::Metadata;
use tracing_subscriber::{
    Layer, Registry,
    filter::{FilterExt as _, LevelFilter, filter_fn},
};

use crate::config;

/// The targets of the spans that are exported.
const TARGETS: [&str; 2] = ["qpq::rpc", "qpq::store"];

crate::section! {
    /// Traces of calls, for an OpenTelemetry collector.
    pub struct Trace {
        /// The address at which the collector receives OTLP over gRPC, as in
        /// `http://127.0.0.1:4317`; `https` trusts the system's certificate authorities.
        /// OpenTelemetry's own variables that begin with `OTEL_EXPORTER_OTLP_` and `OTEL_BSP_`
        /// apply too, for example for headers with credentials.
        endpoint: Option<Endpoint> = None, unset: "none: nothing is traced";
        /// The share of calls that are traced, from 0 to 1.
        sample: Ratio = Ratio(0.01);
        /// The service name in the collector.
        service: String = "qpq-server".into();
        /// The time limit for sending a batch, and for sending the remaining spans when the server
        /// ends.
        timeout: Duration = Duration::from_secs(5);
    }
}

/// The URL of a collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(String);

impl config::Leaf for Endpoint {
    fn kind() -> String {
        "URL".into()
    }

    fn allowed() -> String {
        "a URL, as in http://127.0.0.1:4317 or https://collector.example.org:4317".into()
    }

    fn read(value: &Value) -> Option<Self> {
        let given = <String as config::Leaf>::read(value)?;
        let (scheme, authority) = given.split_once("://")?;
        let is_authority = !authority.is_empty() && authority.chars().all(|c| c.is_ascii_graphic());
        (["http", "https"].contains(&scheme) && is_authority).then_some(Self(given))
    }

    fn show(&self) -> Option<String> {
        config::Leaf::show(&self.0)
    }
}

/// A share, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio(pub f64);

impl config::Leaf for Ratio {
    fn kind() -> String {
        "share".into()
    }

    fn allowed() -> String {
        "a number from 0 to 1, as in 0.01".into()
    }

    fn read(value: &Value) -> Option<Self> {
        let share = <String as config::Leaf>::read(value)?.parse().ok()?;
        (0.0..=1.0).contains(&share).then_some(Self(share))
    }

    fn show(&self) -> Option<String> {
        Some(self.0.to_string())
    }
}

/// The exporter of spans. Dropping it sends the remaining spans within `trace.timeout`, which needs
/// a running tokio runtime.
pub struct Traces {
    provider: Option<SdkTracerProvider>,
    timeout: Duration,
}

/// The error for an address of a collector that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the collector in trace.endpoint cannot be used: {0}")]
pub struct TraceError(#[from] ExporterBuildError);

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces").field("on", &self.provider.is_some()).finish_non_exhaustive()
    }
}

impl Traces {
    /// Creates the configured exporter, which connects when it sends the first batch. Needs a
    /// tokio runtime.
    pub fn start(trace: &Trace, version: &'static str) -> Result<Self, TraceError> {
        let provider = match &trace.endpoint {
            Some(Endpoint(endpoint)) => {
                let mut exporter = SpanExporter::builder()
                    .with_tonic()
                    .with_endpoint(endpoint)
                    .with_timeout(trace.timeout);
                if endpoint.starts_with("https:") {
                    // The default trusts no authority.
                    exporter =
                        exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
                }
                let exporter = exporter.build()?;
                let resource = Resource::builder()
                    .with_service_name(trace.service.clone())
                    .with_attribute(KeyValue::new("service.version", version))
                    .build();
                let sampler =
                    Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(trace.sample.0)));
                let provider = SdkTracerProvider::builder()
                    .with_sampler(sampler)
                    .with_resource(resource)
                    .with_batch_exporter(exporter);
                Some(provider.build())
            }
            None => None,
        };
        Ok(Self { provider, timeout: trace.timeout })
    }

    /// Returns the layer that exports spans, if tracing is on. The layer must be the innermost.
    pub(crate) fn layer(&self) -> Option<Box<dyn Layer<Registry> + Send + Sync>> {
        let tracer = self.provider.as_ref()?.tracer("qpq");
        let spans = filter_fn(is_traced).and(LevelFilter::DEBUG);
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_target(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(spans);
        Some(layer.boxed())
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Some(provider) = &self.provider
            && let Err(error) = provider.shutdown_with_timeout(self.timeout)
        {
            tracing::warn!(%error, "last traces were not sent");
        }
    }
}

fn is_traced(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && TARGETS.contains(&metadata.target())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_usable_endpoints_and_shares_are_accepted() {
        let endpoint = |text: &str| <Endpoint as config::Leaf>::read(&Value::from(text));
        assert_eq!(endpoint("http://[::1]:4317"), Some(Endpoint("http://[::1]:4317".into())));
        assert!(endpoint("https://collector.example.org").is_some());
        for refused in ["", "127.0.0.1:4317", "ftp://a", "http://", "http://a b"] {
            assert_eq!(endpoint(refused), None, "{refused}");
        }
        let share = |value: Value| <Ratio as config::Leaf>::read(&value);
        assert_eq!(share(Value::from(0.25)), Some(Ratio(0.25)));
        assert_eq!(share(Value::from(1)), Some(Ratio(1.0)));
        assert_eq!(share(Value::from("0.5")), Some(Ratio(0.5)));
        for refused in ["-0.1", "1.01", "NaN", "half"] {
            assert_eq!(share(Value::from(refused)), None, "{refused}");
        }
    }
}
