//! `docs/metrics.md`, generated from the tables at the head of each crate's metrics, and compared
//! with a running server.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use bytes::Bytes;
use qpq_proto::{Method as _, methods::OpaqueLoginStart};

use crate::harness::{Data, HANGS, ServerProcess};

const INTRODUCTION: &str = "\
# Metrics

<!-- Generated from the tables in crates/*/src:
     QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-server metrics -->

The metrics of a server, at `/metrics` of `http.listen`, in the Prometheus text format. Each name \
has `# HELP` and `# TYPE` there. A series appears with its first event. No label contains an \
account, a key or an address.

A histogram `X` is exposed as `X_bucket{le}`, `X_sum` and `X_count`. Its bounds depend on the end \
of its name: `_seconds` from 0.5 ms to 60 s, `_bytes` from 64 B to 4 MiB, all others from 1 to 1024.

`deploy/grafana/quicproquo.json` is a dashboard, `deploy/prometheus/alerts.yml` has the alerts. \
`tests/observability/check` runs the queries of both against a running cluster.
";

/// Title, introduction, and the file with the table.
const SECTIONS: &[(&str, &str, &str)] = &[
    ("Process", "Of every server.", include_str!("../../../../crates/runtime/src/metrics.rs")),
    ("Calls", "Of every server.", include_str!("../../../../crates/rpc/src/observe.rs")),
    ("Connections", "Of every server.", include_str!("../../../../crates/transport/src/metric.rs")),
    (
        "Jobs",
        "Of every server. A kind of job appears with its first job.",
        include_str!("../../../../crates/jobs/src/metric.rs"),
    ),
    (
        "Embedded store",
        "Of a single node.",
        include_str!("../../../../crates/store-embedded/src/metrics.rs"),
    ),
    (
        "Cluster store",
        "Of an edge of a cluster.",
        include_str!("../../../../crates/store-cluster/src/metrics.rs"),
    ),
];

/// One row of a table.
struct Metric<'a> {
    name: &'a str,
    labels: BTreeSet<&'a str>,
    kind: &'a str,
    unit: &'a str,
    meaning: &'a str,
}

fn rows(source: &str) -> Vec<Metric<'_>> {
    let table =
        source.lines().filter_map(|line| line.strip_prefix("//! | `qpq_")?.strip_suffix(" |"));
    table
        .map(|row| {
            let [name, kind, unit, meaning] = row.splitn(4, " | ").collect::<Vec<_>>()[..] else {
                panic!("not four columns: {row}")
            };
            let name = name.strip_suffix('`').unwrap();
            let (name, labels) = name.split_once('{').unwrap_or((name, ""));
            let labels =
                labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect();
            Metric { name, labels, kind, unit, meaning }
        })
        .collect()
}

fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    for (title, about, source) in SECTIONS {
        page += &format!(
            "\n## {title}\n\n{about}\n\n| name | kind | unit | labels | meaning |\n|---|---|---|---|---|\n"
        );
        for Metric { name, labels, kind, unit, meaning } in rows(source) {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            let mut meaning = meaning.to_owned();
            meaning[..1].make_ascii_uppercase();
            page += &format!(
                "| `qpq_{name}` | {kind} | {unit} | {} | {meaning} |\n",
                labels.join(", ")
            );
        }
    }
    page
}

#[test]
fn the_committed_list_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
    if qpq_runtime::config::environment().contains(&("QPQ_UPDATE_DOCS".into(), "1".into())) {
        fs::write(path, page()).unwrap();
    }
    assert!(
        fs::read_to_string(path).unwrap() == page(),
        "docs/metrics.md is stale: run QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-server metrics \
         and commit it"
    );
}

/// One name in a page of metrics.
#[derive(Default)]
struct Exposed<'a> {
    kind: &'a str,
    has_help: bool,
    labels: BTreeSet<&'a str>,
}

fn exposed(page: &str) -> BTreeMap<&str, Exposed<'_>> {
    let mut all: BTreeMap<&str, Exposed<'_>> = BTreeMap::new();
    for line in page.lines().filter(|line| !line.is_empty()) {
        if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            all.entry(name).or_default().kind = kind;
        } else if let Some((name, _)) =
            line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '))
        {
            all.entry(name).or_default().has_help = true;
        } else {
            let (series, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| {
                let name = name.strip_suffix(end)?;
                (all.get(name)?.kind == "histogram").then_some(name)
            });
            let keys = labels.split("\",").filter_map(|label| Some(label.split_once('=')?.0));
            let labels = keys.filter(|key| *key != "le");
            all.entry(family.unwrap_or(name)).or_default().labels.extend(labels);
        }
    }
    all
}

#[tokio::test]
async fn every_exposed_metric_is_listed_with_its_kind_and_labels() {
    let data = Data::new();
    let server = ServerProcess::start(data.path(), &[]).await;
    let connection = server.connect().await;
    crate::harness::health(&connection).await;
    let garbage = Bytes::from_static(b"not protobuf");
    connection.call(OpaqueLoginStart::INFO.id, garbage, 8, HANGS).await.unwrap();
    let text = server.page("/metrics").await.1;
    let exposed = exposed(&text);
    let listed: BTreeMap<_, _> = SECTIONS
        .iter()
        .flat_map(|(.., source)| rows(source))
        .map(|metric| (format!("qpq_{}", metric.name), metric))
        .collect();
    for (name, found) in &exposed {
        let metric = listed.get(*name).unwrap_or_else(|| panic!("{name} is in no crate's table"));
        assert!(found.has_help, "{name} is not described");
        assert_eq!(found.kind, metric.kind, "{name}");
        assert_eq!(found.labels, metric.labels, "{name}");
    }
    // All metrics of the first three sections are exposed without further events.
    for metric in SECTIONS[..3].iter().flat_map(|(.., source)| rows(source)) {
        let name = format!("qpq_{}", metric.name);
        assert!(exposed.contains_key(&*name), "{name} is listed and not exposed: {text}");
    }
}
