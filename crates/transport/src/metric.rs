//! The metrics of the transport, recorded through the `metrics` facade.
//!
//! | name | kind | unit | meaning |
//! |---|---|---|---|
//! | `qpq_transport_connections_open` | gauge | connections | connections past their handshake |
//! | `qpq_transport_connections_accepted_total` | counter | connections | connections that finished their handshake |
//! | `qpq_transport_connections_refused_total{reason}` | counter | connections | connections refused: the server drains (`draining`), or a limit is reached (`connections`, `connections_per_ip`, `handshakes`, `handshakes_per_ip`) |
//! | `qpq_transport_handshakes` | gauge | handshakes | handshakes in progress |
//! | `qpq_transport_handshakes_failed_total{reason}` | counter | handshakes | handshakes that failed: not in time (`timeout`), or otherwise (`failed`) |
//! | `qpq_transport_retries_sent_total` | counter | packets | Retry packets, which ask a client to prove its address |
//! | `qpq_transport_streams_open` | gauge | calls | calls in flight: from the first byte of the request until the reply is sent, or acknowledged if that is awaited |
//! | `qpq_transport_requests_refused_total{why}` | counter | requests | requests that the transport refused: `too_large`, `malformed`, `timeout`, the memory of the client (`client_memory`) or of the server (`server_memory`) is in use, `internal` |
//! | `qpq_transport_request_bytes` | gauge | bytes | memory of requests above 4 KiB that are being received or executed |
//! | `qpq_transport_calls_cancelled_total` | counter | calls | calls dropped because the client cancelled them or its connection ended |
//! | `qpq_transport_calls_panicked_total` | counter | calls | calls that panicked |
//! | `qpq_transport_replies_delivered_total` | counter | replies | observed replies that the client acknowledged |
//! | `qpq_transport_replies_lost_total` | counter | replies | observed replies that the client did not acknowledge |
//! | `qpq_transport_replies_too_slow_total` | counter | replies | replies reset because the client accepted them too slowly |
//! | `qpq_tls_cert_not_after_seconds` | gauge | seconds | Unix time at which the served certificate expires |
//! | `qpq_tls_cert_reloads_failed_total` | counter | files | reloads of the certificate files that failed |
//! | `qpq_cluster_key_reloads_failed_total` | counter | files | reloads of the ticket and token keys that failed |

use metrics::{
    Counter, Gauge,
    Unit::{Bytes, Count, Seconds},
    counter, describe_counter, describe_gauge, gauge,
};

use qpq_wire::Refusal;

use crate::admission::LimitReached;

/// Gauge: Unix time in seconds at which the served certificate expires.
pub const CERT_NOT_AFTER: &str = "qpq_tls_cert_not_after_seconds";
/// Counter: reloads of the certificate files that failed.
pub const CERT_RELOADS_FAILED: &str = "qpq_tls_cert_reloads_failed_total";
/// Counter: reloads of the ticket and token keys that failed.
pub const CLUSTER_KEY_RELOADS_FAILED: &str = "qpq_cluster_key_reloads_failed_total";

/// The metrics of one server.
///
/// The handles are looked up once, because a look-up for each call would cost as much as its
/// framing.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) connections_open: Gauge,
    pub(crate) connections_accepted: Counter,
    connections_refused: [Counter; LimitReached::ALL.len()],
    pub(crate) handshakes: Gauge,
    pub(crate) handshakes_timed_out: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) retries_sent: Counter,
    pub(crate) streams_open: Gauge,
    requests_refused: [Counter; Refusal::ALL.len()],
    pub(crate) request_bytes: Gauge,
    pub(crate) calls_cancelled: Counter,
    pub(crate) calls_panicked: Counter,
    pub(crate) replies_delivered: Counter,
    pub(crate) replies_lost: Counter,
    pub(crate) replies_too_slow: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        describe();
        // Registered with zero, so that a rate includes the first failure.
        counter!(CERT_RELOADS_FAILED).increment(0);
        counter!(CLUSTER_KEY_RELOADS_FAILED).increment(0);
        let handshakes_failed =
            |reason| counter!("qpq_transport_handshakes_failed_total", "reason" => reason);
        Self {
            connections_open: gauge!("qpq_transport_connections_open"),
            connections_accepted: counter!("qpq_transport_connections_accepted_total"),
            connections_refused: LimitReached::ALL.map(|reason| {
                counter!("qpq_transport_connections_refused_total", "reason" => reason.label())
            }),
            handshakes: gauge!("qpq_transport_handshakes"),
            handshakes_timed_out: handshakes_failed("timeout"),
            handshakes_failed: handshakes_failed("failed"),
            retries_sent: counter!("qpq_transport_retries_sent_total"),
            streams_open: gauge!("qpq_transport_streams_open"),
            requests_refused: Refusal::ALL
                .map(|why| counter!("qpq_transport_requests_refused_total", "why" => why.label())),
            request_bytes: gauge!("qpq_transport_request_bytes"),
            calls_cancelled: counter!("qpq_transport_calls_cancelled_total"),
            calls_panicked: counter!("qpq_transport_calls_panicked_total"),
            replies_delivered: counter!("qpq_transport_replies_delivered_total"),
            replies_lost: counter!("qpq_transport_replies_lost_total"),
            replies_too_slow: counter!("qpq_transport_replies_too_slow_total"),
        }
    }

    pub(crate) fn connections_refused(&self, reason: LimitReached) -> &Counter {
        &self.connections_refused[reason as usize]
    }

    pub(crate) fn requests_refused(&self, why: Refusal) -> &Counter {
        &self.requests_refused[why as usize]
    }
}

/// Describes the metrics to the recorder.
fn describe() {
    describe_gauge!("qpq_transport_connections_open", Count, "Connections past their handshake");
    describe_counter!(
        "qpq_transport_connections_accepted_total",
        Count,
        "Connections that finished their handshake"
    );
    describe_counter!(
        "qpq_transport_connections_refused_total",
        Count,
        "Connections refused, by reason"
    );
    describe_gauge!("qpq_transport_handshakes", Count, "Handshakes in progress");
    describe_counter!(
        "qpq_transport_handshakes_failed_total",
        Count,
        "Handshakes that failed, by reason"
    );
    describe_counter!(
        "qpq_transport_retries_sent_total",
        Count,
        "Retry packets, which ask a client to prove its address"
    );
    describe_gauge!("qpq_transport_streams_open", Count, "Calls in flight");
    describe_counter!(
        "qpq_transport_requests_refused_total",
        Count,
        "Requests that the transport refused, by reason"
    );
    describe_gauge!(
        "qpq_transport_request_bytes",
        Bytes,
        "Memory of requests above 4 KiB that are being received or executed"
    );
    describe_counter!(
        "qpq_transport_calls_cancelled_total",
        Count,
        "Calls dropped because the client cancelled them or its connection ended"
    );
    describe_counter!("qpq_transport_calls_panicked_total", Count, "Calls that panicked");
    describe_counter!(
        "qpq_transport_replies_delivered_total",
        Count,
        "Observed replies that the client acknowledged"
    );
    describe_counter!(
        "qpq_transport_replies_lost_total",
        Count,
        "Observed replies that the client did not acknowledge"
    );
    describe_counter!(
        "qpq_transport_replies_too_slow_total",
        Count,
        "Replies reset because the client accepted them too slowly"
    );
    describe_gauge!(CERT_NOT_AFTER, Seconds, "Unix time at which the served certificate expires");
    describe_counter!(CERT_RELOADS_FAILED, Count, "Reloads of the certificate files that failed");
    describe_counter!(
        CLUSTER_KEY_RELOADS_FAILED,
        Count,
        "Reloads of the ticket and token keys that failed"
    );
}
