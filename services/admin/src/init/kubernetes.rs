//! The files of a cluster as the manifest of a Kubernetes Secret, in JSON, which is also YAML:
//! `kubectl apply -f -` accepts it.

use std::{collections::BTreeMap, str::FromStr};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::contents::Contents;

/// The name of a Secret or a namespace (RFC 1123).
#[derive(Clone, Debug)]
pub(super) struct Name(String);

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let is_label = |label: &str| {
            let bytes = label.as_bytes();
            label.len() <= 63
                && bytes.first().copied().is_some_and(inner)
                && bytes.last().copied().is_some_and(inner)
                && bytes.iter().all(|&c| inner(c) || c == b'-')
        };
        if text.len() <= 253 && text.split('.').all(is_label) {
            Ok(Self(text.to_owned()))
        } else {
            Err("must be lower-case letters, digits and `-`, as in qpq-cluster".to_owned())
        }
    }
}

/// Returns the manifest, with a line break at its end.
pub(super) fn manifest(name: &Name, namespace: Option<&Name>, contents: &Contents) -> String {
    let data: BTreeMap<_, _> =
        contents.files().map(|file| (file.name, BASE64_STANDARD.encode(&file.bytes))).collect();
    let mut metadata = json!({ "name": name.0 });
    if let Some(namespace) = namespace {
        metadata["namespace"] = Value::from(namespace.0.as_str());
    }
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "Opaque",
        "data": data,
    });
    format!("{secret:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_kubernetes_does_not_accept_are_refused() {
        for good in ["a", "qpq-cluster", "qpq.cluster.1", &"a".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "Qpq", "-a", "a-", "a..b", ".a", "a_b", "a b", "a\n", "ä", &"a".repeat(64)]
        {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
