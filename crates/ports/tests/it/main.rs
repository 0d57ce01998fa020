//! Checks that the list of `conformance!` contains every rule of the suite. A rule that is not in
//! the list compiles but never runs, and the compiler does not report it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Returns the files of a directory and of its subdirectories.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("the areas").map(|entry| entry.expect("an area"));
    let all = entries.map(|entry| entry.path());
    all.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn every_rule_of_the_conformance_suite_is_in_its_list() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/conformance");
    let list = fs::read_to_string(directory.join("mod.rs")).expect("the list");
    let listed: BTreeSet<&str> =
        list.lines().filter_map(|line| line.trim().strip_suffix(',')).collect();
    let mut rules = 0;
    for path in files(&directory) {
        if ["mod.rs", "bench.rs"].iter().any(|other| path.ends_with(other)) {
            continue;
        }
        let area = fs::read_to_string(&path).expect("an area");
        for rule in area.lines().filter_map(|line| line.strip_prefix("pub async fn ")) {
            let name = rule.split('(').next().expect("a name");
            assert!(
                listed.contains(name),
                "{name} of {} is not in the list in mod.rs",
                path.display()
            );
            rules += 1;
        }
    }
    assert!(rules > 100, "only {rules} rules were found: they are written otherwise now");
}
