//! ListReports (423).

use bytes::Bytes;
use qpq_domain::MAX_REPORT;
use qpq_ports::{ReadReports, Report};
use qpq_proto::{convert, methods, v1};

use super::seconds;
use crate::{Admin, Cx, Handled, Handler};

/// The number of reports in an answer if the request names none.
const DEFAULT_REPORTS: u32 = 100;

/// The maximum number of reports in an answer.
const MAX_REPORTS: u32 = 1_000;

/// The maximum size of the reports in an answer, in bytes.
const MAX_BYTES: u32 = 3 << 20;

impl Handler for methods::ListReports {
    fn answer_bytes(request: &v1::ListReportsRequest) -> usize {
        (limit(request.limit) as usize * (MAX_REPORT + Report::FRAMING as usize))
            .min(MAX_BYTES as usize)
    }

    /// Returns fewer reports than the limit if they do not fit an answer. The next page begins
    /// after the reports of this one.
    async fn handle(cx: Cx<'_>, admin: Admin, request: v1::ListReportsRequest) -> Handled<Self> {
        let read = ReadReports {
            reader: admin.caller().identity,
            offset: request.offset,
            limit: limit(request.limit),
            bytes: MAX_BYTES,
            now: cx.now,
        };
        let reports = cx.app.stores.reports.read(read).await?;
        let reports = reports.into_iter().map(listed).collect();
        Ok(v1::ListReportsResponse { reports }.into())
    }
}

fn limit(requested: u32) -> u32 {
    convert::limit(requested).map_or(DEFAULT_REPORTS, u32::from).min(MAX_REPORTS)
}

fn listed(report: Report) -> v1::ReportEntry {
    v1::ReportEntry {
        id: report.id,
        encrypted_report: report.encrypted_report,
        conversation_id: report.conversation,
        reporter_identity: Bytes::copy_from_slice(report.reporter.as_bytes()),
        timestamp: seconds(report.reported_at),
    }
}
