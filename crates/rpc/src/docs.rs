//! Generates `docs/errors.md` from the table in `error.rs`. A test checks that the file is current.

use std::fmt::Write as _;

use crate::Code;

/// Returns the content of `docs/errors.md`.
pub fn errors_md() -> String {
    let mut page = String::from(
        "# Errors\n\n\
         Generated from `crates/rpc/src/error.rs`; \
         `QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-rpc` updates it.\n\n\
         Every answer other than Ok contains an `ErrorDetail` with one of these codes. A code\n\
         never changes its meaning; clients and metrics depend on it. `RateLimited` and\n\
         `Unavailable` always have the number of milliseconds to wait before a retry.\n\n\
         | code | status | meaning |\n|---|---|---|\n",
    );
    for code in Code::ALL {
        let status = code.status();
        writeln!(
            page,
            "| `{}` | {} {} | {} |",
            code.as_str(),
            status.code(),
            status.name(),
            code.message()
        )
        .expect("a String grows");
    }
    page
}
