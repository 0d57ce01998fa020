//! ReportMessage (420).

use qpq_domain::{MAX_CONVERSATION_ID, MAX_REPORT};
use qpq_ports::{NewReport, Reporting};
use qpq_proto::{FieldError, convert, convert::FieldReason, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler};

impl Handler for methods::ReportMessage {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::ReportMessageRequest,
    ) -> Handled<Self> {
        if request.encrypted_report.is_empty() {
            return Err(FieldError::new("encrypted_report", FieldReason::Combination).into());
        }
        convert::no_longer_than(&request.encrypted_report, MAX_REPORT, "encrypted_report")?;
        convert::no_longer_than(&request.conversation_id, MAX_CONVERSATION_ID, "conversation_id")?;
        let report = NewReport {
            reporter: caller.account,
            conversation: request.conversation_id,
            encrypted_report: request.encrypted_report,
            now: cx.now,
        };
        match cx.app.stores.reports.report(report).await? {
            Reporting::Stored | Reporting::Repeated => {}
            Reporting::Full => return Err(Error::TooManyReports),
        }
        Ok(v1::ReportMessageResponse { accepted: true }.into())
    }
}
