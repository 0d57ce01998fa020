//! What the transport measures, through the `metrics` facade; the names are here and nowhere else.
//!
//! | name | kind | unit | what |
//! |---|---|---|---|
//! | `qpq_transport_connections_open` | gauge | connections | connections past their handshake |
//! | `qpq_transport_connections_accepted_total` | counter | connections | connections that finished their handshake |
//! | `qpq_transport_connections_refused_total{reason}` | counter | connections | connections refused: `draining`, or too many `connections`, `connections_per_ip`, `handshakes` or `handshakes_per_ip` |
//! | `qpq_transport_handshakes` | gauge | handshakes | handshakes going on |
//! | `qpq_transport_handshakes_failed_total{reason}` | counter | handshakes | handshakes that came to nothing: `timeout`, `failed` |
//! | `qpq_transport_retries_sent_total` | counter | packets | clients asked to prove their address |
//! | `qpq_transport_streams_open` | gauge | calls | calls being read, run, answered or awaiting acknowledgement |
//! | `qpq_transport_requests_refused_total{why}` | counter | requests | requests that were not run, or not to their end: `too_large`, `malformed`, `timeout`, `internal` |
//! | `qpq_transport_calls_cancelled_total` | counter | calls | calls dropped because the client stopped or went |
//! | `qpq_transport_calls_panicked_total` | counter | calls | calls that panicked |
//! | `qpq_transport_replies_delivered_total` | counter | replies | replies with a delivery that were acknowledged |
//! | `qpq_transport_replies_lost_total` | counter | replies | replies with a delivery that were not |
//! | `qpq_transport_replies_too_slow_total` | counter | replies | replies stopped because the client accepted them too slowly |
//! | `qpq_tls_cert_not_after_seconds` | gauge | seconds | Unix time at which the served certificate expires |
//! | `qpq_tls_cert_reloads_failed_total` | counter | files | certificate files that changed and could not be used |
//! | `qpq_fleet_key_reloads_failed_total` | counter | files | files of ticket and token keys that changed and could not be used |

use metrics::{
    Counter, Gauge,
    Unit::{Count, Seconds},
    counter, describe_counter, describe_gauge, gauge,
};

use crate::{Refusal, gate::Refused};

/// Gauge: Unix time in seconds at which the served certificate expires.
pub const CERT_NOT_AFTER: &str = "qpq_tls_cert_not_after_seconds";
/// Counter: certificate files that changed and could not be used.
pub const CERT_RELOADS_FAILED: &str = "qpq_tls_cert_reloads_failed_total";
/// Counter: files of ticket and token keys that changed and could not be used.
pub const FLEET_KEY_RELOADS_FAILED: &str = "qpq_fleet_key_reloads_failed_total";

/// The handles of one server, looked up once: a look-up for each call would cost as much as its
/// framing.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) connections_open: Gauge,
    pub(crate) connections_accepted: Counter,
    connections_refused: [Counter; Refused::ALL.len()],
    pub(crate) handshakes: Gauge,
    pub(crate) handshakes_timed_out: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) retries_sent: Counter,
    pub(crate) streams_open: Gauge,
    requests_refused: [Counter; Refusal::ALL.len()],
    pub(crate) calls_cancelled: Counter,
    pub(crate) calls_panicked: Counter,
    pub(crate) replies_delivered: Counter,
    pub(crate) replies_lost: Counter,
    pub(crate) replies_too_slow: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        describe();
        // From the start at zero, so that a rate sees the first.
        counter!(CERT_RELOADS_FAILED).increment(0);
        counter!(FLEET_KEY_RELOADS_FAILED).increment(0);
        Self {
            connections_open: gauge!("qpq_transport_connections_open"),
            connections_accepted: counter!("qpq_transport_connections_accepted_total"),
            connections_refused: Refused::ALL.map(
                |reason| counter!("qpq_transport_connections_refused_total", "reason" => reason.label()),
            ),
            handshakes: gauge!("qpq_transport_handshakes"),
            handshakes_timed_out: counter!("qpq_transport_handshakes_failed_total", "reason" => "timeout"),
            handshakes_failed: counter!("qpq_transport_handshakes_failed_total", "reason" => "failed"),
            retries_sent: counter!("qpq_transport_retries_sent_total"),
            streams_open: gauge!("qpq_transport_streams_open"),
            requests_refused: Refusal::ALL
                .map(|why| counter!("qpq_transport_requests_refused_total", "why" => why.label())),
            calls_cancelled: counter!("qpq_transport_calls_cancelled_total"),
            calls_panicked: counter!("qpq_transport_calls_panicked_total"),
            replies_delivered: counter!("qpq_transport_replies_delivered_total"),
            replies_lost: counter!("qpq_transport_replies_lost_total"),
            replies_too_slow: counter!("qpq_transport_replies_too_slow_total"),
        }
    }

    pub(crate) fn connections_refused(&self, reason: Refused) -> &Counter {
        &self.connections_refused[reason as usize]
    }

    pub(crate) fn requests_refused(&self, why: Refusal) -> &Counter {
        &self.requests_refused[why as usize]
    }
}

/// Tells the recorder what the names mean.
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
    describe_gauge!("qpq_transport_handshakes", Count, "Handshakes going on");
    describe_counter!(
        "qpq_transport_handshakes_failed_total",
        Count,
        "Handshakes that came to nothing"
    );
    describe_counter!(
        "qpq_transport_retries_sent_total",
        Count,
        "Clients asked to prove their address"
    );
    describe_gauge!(
        "qpq_transport_streams_open",
        Count,
        "Calls being read, run, answered or awaiting acknowledgement"
    );
    describe_counter!(
        "qpq_transport_requests_refused_total",
        Count,
        "Requests that were not run to their end"
    );
    describe_counter!(
        "qpq_transport_calls_cancelled_total",
        Count,
        "Calls dropped because the client stopped or went"
    );
    describe_counter!("qpq_transport_calls_panicked_total", Count, "Calls that panicked");
    describe_counter!(
        "qpq_transport_replies_delivered_total",
        Count,
        "Replies with a delivery that were acknowledged"
    );
    describe_counter!(
        "qpq_transport_replies_lost_total",
        Count,
        "Replies with a delivery that were not"
    );
    describe_counter!(
        "qpq_transport_replies_too_slow_total",
        Count,
        "Replies stopped because the client accepted them too slowly"
    );
    describe_gauge!(CERT_NOT_AFTER, Seconds, "Unix time at which the served certificate expires");
    describe_counter!(
        CERT_RELOADS_FAILED,
        Count,
        "Certificate files that changed and could not be used"
    );
    describe_counter!(
        FLEET_KEY_RELOADS_FAILED,
        Count,
        "Files of shared keys that changed and could not be used"
    );
}
