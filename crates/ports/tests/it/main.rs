//! What the compiler cannot say of the conformance suite: a rule that the list in `conformance!`
//! leaves out compiles, binds nobody, and would be missed by nobody.

use std::{collections::BTreeSet, fs, path::Path};

#[test]
fn every_rule_of_the_conformance_suite_is_in_its_list() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/conformance");
    let list = fs::read_to_string(directory.join("mod.rs")).expect("the list");
    let listed: BTreeSet<&str> =
        list.lines().filter_map(|line| line.trim().strip_suffix(',')).collect();
    let mut rules = 0;
    for entry in fs::read_dir(&directory).expect("the areas") {
        let path = entry.expect("an area").path();
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
    assert!(rules > 50, "only {rules} rules were found: they are written otherwise now");
}
