//! `docs/configuration.md`, generated from the declaration.

use std::fs;

use qpq_runtime::config::{environment, markdown};

use super::{Config, FOREIGN_VARIABLES};

const INTRODUCTION: &str = "\
# Configuration of `qpq-server`

<!-- Generated from services/edge/src/config.rs:
     QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-server -->

No setting is required. Settings come in layers. A later layer takes precedence:

1. the defaults below
2. a TOML file, named with `--config FILE` or `QPQ_CONFIG`
3. the environment: each key has a variable, `QPQ_` and the key in capitals, with `__` where the \
key has a dot (`tls.reload_interval` is `QPQ_TLS__RELOAD_INTERVAL`). Some keys have a second name, \
given below. If both are set, the long name takes precedence
4. flags

Unknown keys, unknown variables with the prefix `QPQ_` and invalid values are errors. \
`qpq-server config check` lists them, `qpq-server config show` prints the effective settings and \
their origins.

| kind | in the file | in a variable |
|---|---|---|
| text, path | `\"/var/lib/qpq\"` | `/var/lib/qpq` |
| truth | `true`, `false` | the same |
| number | `64` | the same |
| addresses | `\"[::]:5001\"`, or a list; a zone as in `\"[fe80::1%eth0]:5001\"` | `0.0.0.0:5001,[::1]:5001` |
| address | `\"127.0.0.1:5001\"`, `\"[::]:5001\"` | `127.0.0.1:5001` |
| duration | `\"250ms\"`, `\"30s\"`, `\"15m\"`, `\"12h\"`, `\"30d\"`, or a number of seconds | `30s` |
| size | `\"512B\"`, `\"64KiB\"`, `\"4MiB\"`, `\"1GiB\"`, or a number of bytes | `4MiB` |
| share | `0.01` | the same |
| list | `[\"one\", \"two\"]` | `one,two` |
| budget | `\"20 + 60/m\"`: a burst of 20 calls and 60 more in every minute (`s`, `m` or `h`) | `20 + 60/m` |
| log directives | `\"warn,qpq_rpc=debug\"`: levels, of all or by module | `warn,qpq_rpc=debug` |

A file looks like this:

```toml
listen = \"[::]:5001\"
data_dir = \"/var/lib/qpq\"
domain = \"example.org\"

[tls]
cert = \"/etc/qpq/fullchain.pem\"
key = \"/etc/qpq/key.pem\"

[limits]
login.ip = \"60 + 60/m\"
```
";

fn page() -> String {
    let foreign: Vec<_> = FOREIGN_VARIABLES.iter().map(|name| format!("`{name}`")).collect();
    format!(
        "{INTRODUCTION}{}\n## Other variables\n\nThe server ignores {}, which are for the client, \
         the tests or the documentation.\n",
        markdown::<Config>(),
        foreign.join(", ")
    )
}

#[test]
fn the_committed_reference_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
    if environment().contains(&("QPQ_UPDATE_DOCS".into(), "1".into())) {
        fs::write(path, page()).expect("docs/ is writable");
    }
    let committed = fs::read_to_string(path).expect("docs/configuration.md is in the tree");
    assert!(
        committed == page(),
        "docs/configuration.md is stale: run QPQ_UPDATE_DOCS=1 cargo nextest run -p qpq-server and \
         commit it"
    );
}

#[test]
fn the_example_of_the_reference_is_a_valid_configuration() {
    let example =
        INTRODUCTION.split("```").nth(1).and_then(|block| block.strip_prefix("toml")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, example).unwrap();
    let sources =
        qpq_runtime::config::Sources { file: Some(file.path().into()), ..Default::default() };
    let config = qpq_runtime::config::load::<Config>(sources).unwrap().settings;
    assert_eq!(config.domain, "example.org");
}
