//! `docs/cli.md` agrees with the program.

use std::{collections::BTreeSet, fs, path::Path};

const DOCS: &str = include_str!("../../../../docs/cli.md");

/// Returns every `client.…` and `profile.…` between such delimiters.
fn codes(text: &str, delimiter: char) -> BTreeSet<String> {
    let is_code = |word: &&str| {
        let name = word.strip_prefix("client.").or_else(|| word.strip_prefix("profile."));
        name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
    };
    text.split(delimiter).filter(is_code).map(str::to_owned).collect()
}

fn sources(dir: &Path) -> String {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| if path.is_dir() { sources(&path) } else { fs::read_to_string(path).unwrap() })
        .collect()
}

#[test]
fn every_code_is_documented_and_no_other() {
    let src = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let table = DOCS.split("\n## ").find(|section| section.starts_with("Codes\n")).unwrap();
    let documented = codes(table, '`');

    assert_eq!(documented, codes(&src, '"'));
}

#[test]
fn every_exit_code_is_documented_and_shown_by_help() {
    let help =
        std::process::Command::new(env!("CARGO_BIN_EXE_qpq")).arg("help").output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    let (_, shown) = help.split_once("Exit codes:\n").unwrap();
    let shown: Vec<_> = shown.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let table = DOCS.split("\n## ").find(|section| section.starts_with("Exit codes\n")).unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next());
    let documented: Vec<_> = rows.filter(|cell| cell.parse::<u8>().is_ok()).collect();
    assert_eq!(documented, shown);
    assert!(shown.len() >= 10, "{shown:?}");
}
