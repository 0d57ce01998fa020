//! Generates `docs/rpc.md` from the tables of this crate, so that the document always matches the
//! code.

use std::fmt::Write as _;

use crate::{
    auth::AuthKind,
    deadlines::DeadlineClass,
    event::EventType,
    limits::{LimitClass, LimitDefault},
    methods::{METHODS, MethodInfo},
    retry::RetryPolicy,
    status::Status,
};

/// Returns the document.
pub fn rpc_markdown() -> String {
    let mut page = String::from(INTRODUCTION);
    methods(&mut page);
    authentication(&mut page);
    limits(&mut page);
    deadlines(&mut page);
    retries(&mut page);
    statuses(&mut page);
    events(&mut page);
    page
}

const INTRODUCTION: &str = "\
# The remote procedure calls

Generated from the tables in `proto/src`; do not edit. The messages, with the unit and length of
each field, are in `proto/qpq/v1/`. Frames and connections are described in `protocol.md`.
";

fn methods(page: &mut String) {
    let served = METHODS.iter().filter(|method| method.served).count();
    line(page, format_args!("\n## Methods\n"));
    line(
        page,
        format_args!(
            "{} methods, {served} served. A call of the others returns `UnknownMethod`.\n",
            METHODS.len()
        ),
    );
    line(
        page,
        format_args!(
            "| id | method | authentication | limit | deadline | largest request | retry | \
             request → response | | description |"
        ),
    );
    line(page, format_args!("|---|---|---|---|---|---|---|---|---|---|"));
    for method in METHODS {
        let MethodInfo { id, name, doc, request, response, auth, .. } = method;
        let MethodInfo { limit, deadline, largest_request, retry, served, .. } = method;
        line(
            page,
            format_args!(
                "| {id} | {name} | {} | {} | {} | {} | {} | `{request}` → `{response}` | {} | {doc} |",
                auth.name(),
                limit.name(),
                deadline.name(),
                largest_request.name(),
                retry.name(),
                if *served { "served" } else { "later" },
            ),
        );
    }
}

fn authentication(page: &mut String) {
    line(page, format_args!("\n## Authentication\n\n| name | meaning |\n|---|---|"));
    for auth in AuthKind::ALL {
        line(page, format_args!("| {} | {} |", auth.name(), auth.doc()));
    }
}

fn limits(page: &mut String) {
    line(page, format_args!("\n## Limit classes\n"));
    line(
        page,
        format_args!(
            "A budget is a token bucket: a call consumes one token of each budget of its class\n\
             whose subject it has. Without a token it fails with `RateLimited`. These are the\n\
             defaults; the configuration can change them or turn them off."
        ),
    );
    line(
        page,
        format_args!("\n| class | subject | burst | refill | limits |\n|---|---|---|---|---|"),
    );
    for class in LimitClass::ALL {
        for LimitDefault { subject, burst, refill, every } in class.defaults() {
            let unit = match every.as_secs() {
                1 => "a second",
                60 => "a minute",
                3600 => "an hour",
                other => unreachable!("no word for {other} s"),
            };
            let (name, subject, doc) = (class.name(), subject.name(), class.doc());
            line(page, format_args!("| {name} | {subject} | {burst} | {refill} {unit} | {doc} |"));
        }
    }
}

fn deadlines(page: &mut String) {
    line(page, format_args!("\n## Deadlines\n\n| class | time limit |\n|---|---|"));
    for class in DeadlineClass::ALL {
        let own = if class == DeadlineClass::Wait { "the requested wait + " } else { "" };
        let seconds = class.duration(std::time::Duration::ZERO).as_secs();
        line(page, format_args!("| {} | {own}{seconds} s |", class.name()));
    }
}

fn retries(page: &mut String) {
    line(page, format_args!("\n## Retry policies\n"));
    line(
        page,
        format_args!(
            "Whether a client may repeat a call whose outcome is unknown. After `RateLimited` and\n\
             `Unavailable`, which have no effect, it may repeat every call.\n"
        ),
    );
    line(page, format_args!("| policy | meaning |\n|---|---|"));
    for policy in RetryPolicy::ALL {
        line(page, format_args!("| {} | {} |", policy.name(), policy.doc()));
    }
}

fn statuses(page: &mut String) {
    line(page, format_args!("\n## Status\n"));
    line(
        page,
        format_args!(
            "Each response except Ok carries an `ErrorDetail`. 6 and 7 are reserved and never sent.\n"
        ),
    );
    line(page, format_args!("| byte | name | retry | meaning |\n|---|---|---|---|"));
    for status in Status::ALL {
        let retry = if status.is_temporary() { "yes" } else { "" };
        line(
            page,
            format_args!("| {} | {} | {retry} | {} |", status.code(), status.name(), status.doc()),
        );
    }
}

fn events(page: &mut String) {
    line(page, format_args!("\n## Events\n\n| type | message |\n|---|---|"));
    for event in EventType::ALL {
        line(page, format_args!("| {} | `{}Event` |", event.code(), event.name()));
    }
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(page, "{text}").expect("a String grows");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "a switch for the author of a change, not configuration"
    )]
    fn the_committed_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rpc.md");
        if std::env::var("QPQ_UPDATE_DOCS").is_ok_and(|value| value == "1") {
            std::fs::write(path, rpc_markdown()).expect("docs/ is writable");
        }
        let committed = std::fs::read_to_string(path).expect("docs/rpc.md is in the tree");
        assert!(
            committed == rpc_markdown(),
            "docs/rpc.md is stale: run QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-proto and commit it"
        );
    }
}
