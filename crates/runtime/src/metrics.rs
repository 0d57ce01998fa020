//! Metrics: one Prometheus recorder for each process. Each crate documents and describes its own
//! names. The ending of a histogram's name, `_seconds` or `_bytes`, selects its buckets.
//!
//! | name | kind | unit | meaning |
//! |---|---|---|---|
//! | `qpq_build_info{version}` | gauge | 1 | always 1; the label is the version |
//! | `qpq_live` | gauge | 0 or 1 | 1 while `/livez` answers 200, else 0 |
//! | `qpq_ready` | gauge | 0 or 1 | 1 while `/readyz` answers 200, else 0 |

use std::sync::OnceLock;

use metrics::{describe_gauge, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper bounds for times in seconds: from a call answered from memory to a long wait.
const SECONDS: &[f64] = &[
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];
/// Upper bounds for sizes in bytes: from an empty answer to the largest frame.
const BYTES: &[f64] =
    &[64.0, 256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0];
/// Upper bounds for all other histograms, which count things.
const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1_024.0];

const BUILD_INFO: &str = "qpq_build_info";
pub(crate) const LIVE: &str = "qpq_live";
pub(crate) const READY: &str = "qpq_ready";

/// A handle on the metrics of the process.
#[derive(Clone)]
pub struct Metrics(PrometheusHandle);

static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();

/// Returns the recorder of the process. The first call installs it.
pub fn install(version: &'static str) -> Metrics {
    let handle = INSTALLED.get_or_init(|| {
        let handle = PrometheusBuilder::new()
            .set_buckets(COUNTS)
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
            })
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Suffix("_bytes".into()), BYTES)
            })
            .and_then(PrometheusBuilder::install_recorder)
            .expect(
                "the bounds are not empty and no other code of this program installs a recorder",
            );
        describe_gauge!(BUILD_INFO, "Always 1; the label is the version");
        describe_gauge!(LIVE, "1 while /livez answers 200, else 0");
        describe_gauge!(READY, "1 while /readyz answers 200, else 0");
        gauge!(BUILD_INFO, "version" => version).set(1.0);
        handle
    });
    Metrics(handle.clone())
}

impl Metrics {
    /// Returns all metrics in the Prometheus text format.
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Moves observations from the recorder's buffers into the histograms. Must be called every few
    /// seconds, because otherwise the buffers grow until the next scrape.
    pub fn run_maintenance(&self) {
        self.0.run_upkeep();
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_rendered_with_their_help_and_buckets() {
        install("1.2.3");
        metrics::counter!("test_calls_total").increment(2);
        metrics::histogram!("test_wait_seconds").record(0.003);
        let text = install("4.5.6").render();
        assert!(text.contains("qpq_build_info{version=\"1.2.3\"} 1"), "{text}");
        assert!(
            text.contains("# HELP qpq_build_info Always 1; the label is the version\n"),
            "{text}"
        );
        assert!(text.contains("test_calls_total 2"), "{text}");
        assert!(text.contains("test_wait_seconds_bucket{le=\"0.0025\"} 0"), "{text}");
        assert!(text.contains("test_wait_seconds_bucket{le=\"0.005\"} 1"), "{text}");
    }
}
