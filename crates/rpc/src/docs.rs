//! Writes `docs/errors.md`: every code that a client may meet, from the table in `error.rs`. A test
//! keeps the file current.

use std::fmt::Write as _;

use crate::Code;

/// The whole of `docs/errors.md`.
pub fn errors_md() -> String {
    let mut page = String::from(
        "# Errors\n\n\
         Generated from `crates/rpc/src/error.rs`; `QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-rpc` rewrites it.\n\n\
         Every answer other than Ok carries an `ErrorDetail` with one of these codes. Codes never change their meaning;\n\
         client code and metrics switch on them. `RateLimited` and `Unavailable` always say after how many milliseconds\n\
         to try again.\n\n\
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
