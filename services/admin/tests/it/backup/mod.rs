//! `backup`, `verify`, `restore` and `mark-restored`.

mod cluster;
mod node;
mod repeated;

use std::{fs, path::Path};

/// What a cluster's and a node's tests have in common: each file of a backup, damaged in each way, is
/// named.
fn every_damage_is_found(backup: &Path, verify: impl Fn() -> String) {
    let mut files = Vec::new();
    let mut directories = vec![backup.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { files.push(path) }
        }
    }
    assert!(files.len() >= 7, "{files:?}");
    for file in files {
        let good = fs::read(&file).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let cut = good[..good.len() - 1].to_vec();
        let name = file.file_name().unwrap().to_str().unwrap();
        for damaged in [Some(flipped), Some(cut), None] {
            match &damaged {
                Some(damaged) => fs::write(&file, damaged).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            let said = verify();
            // The manifest and its hash vouch for each other.
            assert!(said.contains(name) || said.contains("manifest.json"), "{name}: {said}");
        }
        fs::write(&file, good).unwrap();
    }
    fs::write(backup.join("another"), "file").unwrap();
    let said = verify();
    assert!(said.contains("no part of the backup: another"), "{said}");
    fs::remove_file(backup.join("another")).unwrap();
}
